"""Pure functions of tensors: routing, balance, and what watches the routers of a live model."""
