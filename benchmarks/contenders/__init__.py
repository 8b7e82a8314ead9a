"""One MoE layer of every system that is compared, on the same tokens, weights and choices."""
