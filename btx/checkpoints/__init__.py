"""Files of models: read, validated, written; the tokenizers beside them."""
