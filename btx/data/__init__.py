"""From documents to packed sequences of token ids."""
