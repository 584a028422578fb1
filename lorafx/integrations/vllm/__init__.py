"""vLLM's plugin: its scheduler and attention, lorafx's LoRA. Importing it imports no vLLM."""
