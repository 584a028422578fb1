"""Calls of a compiled model: which adapter each request uses, slots, generation, warm-up."""
