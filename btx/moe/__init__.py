"""Routing and load balancing as pure functions of tensors, and hooks on the routers of a live model."""
