"""The founding claims: what was claimed, what its source says, and what a run measured; one claim, one file."""
