"""The only folder that touches private parts of torch, triton, transformers and peft.

`versions`, `entries`, `entrances` and `shortcuts` say what was tested, what is needed, what fails
for another torch, and what may be off; the rest has a subject each (docs/torch_internals.md). The
first use of lorafx checks the versions, and so does every import of private names; importing
`versions`, `entries` and `entrances` does not, so that `lorafx doctor` runs where nothing else
does.
"""
