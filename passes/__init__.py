"""Compiler passes: a file or folder each. `lorafx.pipeline` has their order."""
