"""Native transformers models: families, configs, loading, kernels, and what they cost."""
