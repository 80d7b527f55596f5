"""Conversions beside each other on one seed, data and budget: trials in rounds, each round a static graph."""
