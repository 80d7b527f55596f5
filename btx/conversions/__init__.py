"""From a recipe to the graph of its steps, and what is looked at before anything is written."""
