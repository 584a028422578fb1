"""lorafx: a compiler that makes LoRA inference fast and correct for any PyTorch model."""
