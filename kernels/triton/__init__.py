"""Generated Triton: templates, their kernels, and ops that launch them."""
