"""Dialects of adapters: how libraries other than PEFT name and lay out the same factors."""
