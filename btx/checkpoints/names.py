"""Names of tensors that every family of ours shares."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
