"""Graphs that are compiled beside the calls: processes, their turns, and what they hand over."""
