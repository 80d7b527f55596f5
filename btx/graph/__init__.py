"""What a step is, where its result lies, who may publish it, and what runs next."""
