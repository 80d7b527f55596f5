"""What leaves the run: the card, the golden logits, layouts, and an export changed afterwards."""
