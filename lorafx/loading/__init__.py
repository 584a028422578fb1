"""Checkpoint tensors into the weights of a model: what names mean, where numbers go, writes."""
