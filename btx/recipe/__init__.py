"""The recipe that a user writes: its sections, their validation, and the error messages."""
