"""From a recipe to the graph of its steps, and what is looked at before anything is written."""

STAGES = ("branch", "train", "merge", "finetune", "evaluate", "export", "report")  # of every recipe, in order
