"""The only folder that touches private parts of torch, triton, transformers and peft.

`versions`, `entries`, `entrances` and `shortcuts` define what was tested, what is required, what
fails with another torch, and what may be off; the rest has a subject each
(docs/torch_internals.md). The first use of lorafx, and every import of private names, checks the
versions; importing `versions`, `entries` and `entrances` does not, so that `lorafx doctor` always
runs.
"""
