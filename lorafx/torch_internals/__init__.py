"""The only folder that touches private parts of torch, triton, transformers and peft.

The first use of lorafx, and every import of private names, checks the versions; importing
`versions`, `entries` and `entrances` does not, so that `lorafx doctor` always runs. The table is
docs/torch_internals.md.
"""
