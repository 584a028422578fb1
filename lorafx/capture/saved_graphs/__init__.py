"""Graphs saved to a folder, and verified and loaded by later processes."""
