"""The parts of `benchmarks/capacity.py`."""
