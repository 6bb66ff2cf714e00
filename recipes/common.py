"""What the commands of this folder share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

from xcos_ext.io.atomic import write_atomically

__all__ = ["say", "write_json"]


def say(line: str) -> None:
    """A line about progress."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file of results; a failure leaves the one before."""

    def write(file: BinaryIO) -> None:
        file.write(f"{json.dumps(value, indent=1)}\n".encode())

    write_atomically(path, write)
