"""A dense checkpoint, read and judged."""
