"""Text into tokens: documents, the kinds of them, packing, and windows to score."""
