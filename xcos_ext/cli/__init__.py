"""The ``xcos`` command.

Importing this package is cheap: click is imported by :func:`main`, a subcommand when it is called, and torch, OpenCV
and matplotlib by the subcommands that use them.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``xcos`` command; ends the process with the subcommand's exit status."""
    try:
        from .app import xcos
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(
            f"xcos: the command line needs {error.name}, which is not installed: pip install 'xcos_ext[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    xcos(prog_name="xcos")
