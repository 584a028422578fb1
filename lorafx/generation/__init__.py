"""`generate`, aLoRA, batches in waves, and continuous batching."""
