"""Compiler passes, one a file. The order they run in is `lorafx.pipeline.PIPELINE`."""
