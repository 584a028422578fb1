"""Packages: models with LoRA as files that AOTInductor compiled, to run without a compiler."""
