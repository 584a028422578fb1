"""`python -m lorafx` is the command `lorafx`."""

from lorafx.cli import main

if __name__ == "__main__":
    main()
