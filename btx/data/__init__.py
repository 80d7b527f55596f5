"""From documents to packed sequences of ids."""
