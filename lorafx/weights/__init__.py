"""Base weights: checkpoints into a model, live updates, merging, exporting."""
