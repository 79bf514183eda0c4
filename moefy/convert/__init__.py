"""The method: one layer at a time, on the already converted prefix."""
