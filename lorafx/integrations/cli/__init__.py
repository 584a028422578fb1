"""The command `lorafx`: its entry point. The commands are in lorafx.integrations.cli.app.

Exit codes: 0 done; 1 lorafx refuses (an adapter that does not fit, a file that cannot be read);
2 a command line that cannot be understood; 130 interrupted.
"""

from __future__ import annotations

import json
import sys

from lorafx.errors import LorafxError, respelled


def main() -> None:
    """Run the command that `sys.argv` says, and exit. An error of lorafx is one line."""
    try:
        from lorafx.integrations.cli.app import app
        from lorafx.integrations.cli.options import as_option
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("the lorafx command needs typer and rich: pip install 'lorafx[cli]'")
    try:
        app()
    except LorafxError as error:
        message = respelled(error, as_option)
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "message": message}))
            sys.exit(1)
        sys.exit(f"lorafx: {message}")
    except KeyboardInterrupt:
        sys.exit(130)
