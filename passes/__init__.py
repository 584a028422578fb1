"""Compiler passes, one a file. The order they run in is `lorafx.capture.pipeline.PIPELINE`."""
