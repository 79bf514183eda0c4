"""The fine-tune after a conversion: distil from the dense model, keep the experts balanced."""
