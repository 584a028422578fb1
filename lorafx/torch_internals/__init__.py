"""The only folder that touches private parts of torch, triton, transformers and peft.

    versions     which versions were tested, and which are refused
    entries      what each module here needs, as a table; errors for names that are missing
    entrances    what fails later because torch is another one, as one error
    shortcuts    what saves time by private ground, and may be off
    the rest     a subject each: its names, and what is patched there

docs/torch_internals.md is the table. Nothing outside imports or patches private modules. The first
use of lorafx checks the versions, and so does every import of private names; importing the first
three modules does not, so that `lorafx doctor` runs where nothing else does.
"""
