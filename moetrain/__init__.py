"""Pretrain sparse-gated Mixture-of-Experts transformers with expert parallelism."""
