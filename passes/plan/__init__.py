"""plan: how each LoRA node is computed."""
