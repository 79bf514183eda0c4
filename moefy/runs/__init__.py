"""A finished run: its folder, and what is done with it."""
