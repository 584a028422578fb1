"""Generated Triton: templates, what is compiled of them, ops that launch it."""
