"""Adapters: reading checkpoints, banks on the device, and the store that fills them."""
