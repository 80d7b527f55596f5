"""What a user writes: the recipe, its sections, and how mistakes in it are told."""
