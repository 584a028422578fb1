"""Compiler passes: one file each, or a folder of that name. `lorafx.pipeline` has their order."""
