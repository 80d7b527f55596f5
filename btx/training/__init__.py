"""One training loop, its loss, schedule, state and metrics."""
