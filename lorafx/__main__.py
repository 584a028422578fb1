"""`python -m lorafx` is the command `lorafx`."""

from lorafx.integrations.cli import main

if __name__ == "__main__":
    main()
