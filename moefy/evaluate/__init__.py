"""How far a converted model is from the dense one, and what its controls would have lost."""
