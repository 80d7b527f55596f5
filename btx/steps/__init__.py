"""One stage, one file. A step reads its parents' folders and fills one of its own."""
