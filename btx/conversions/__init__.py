"""From a recipe to the graph of its steps, and the checks before anything is written."""

STAGES = ("branch", "train", "merge", "finetune", "evaluate", "export", "report")  # of every recipe, in order
