"""Compiler passes, a file or folder each; `lorafx.pipeline` has their order, `spec` and
`model_spec` what each promises."""
