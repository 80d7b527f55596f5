"""Tasks: prompts with answers that are judged, generation, the sandbox that runs programs, and lm-eval's interface."""
