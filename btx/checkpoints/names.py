"""Tensor names that all supported families share."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
