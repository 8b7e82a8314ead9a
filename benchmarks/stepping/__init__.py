"""What `benchmarks/step.py` compares: whole training steps of one shape, by moetrain and others."""
