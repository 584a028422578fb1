"""The only folder that touches private parts of torch, triton, transformers and peft.

The first use of lorafx, and every import of private names, checks the versions; importing
`versions` does not, so that `lorafx doctor` always runs. What each module is used
for, and what would end it, is in docs/torch_internals.md.
"""
