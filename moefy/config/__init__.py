"""What a user may ask for, and how it is checked."""
