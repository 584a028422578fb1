"""Pipelines of diffusers whose models serve many adapters in one batch."""
