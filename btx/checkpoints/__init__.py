"""Checkpoint files, and the tokenizers beside them: validated, read and written."""
