"""What is known of model classes: dense families, stock MoE targets, shapes, routing."""
