"""The ops, each with a reference in plain aten."""
