"""The only folder that touches private parts of torch, triton, transformers and peft.

The first use of lorafx, and every import of private names, checks the versions; importing
`versions` does not, so that `lorafx doctor` always runs. docs/torch_internals.md says what each
module is used for, and what could replace it.
"""
