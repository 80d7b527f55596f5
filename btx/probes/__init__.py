"""Probes, one per file: each maps (model, data) to numbers and a row per item."""
