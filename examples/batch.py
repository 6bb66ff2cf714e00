"""Compare the pairs of a CSV file and write their scores and verdicts beside them.

python examples/batch.py pairs.csv --out verdicts.csv      # columns a, b: paths, from the file's folder
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from pathlib import Path

import xcos_ext


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="CSV with a header and the columns a and b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a name of xcos models list, or a file")
    options = parser.parse_args()
    with options.pairs.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    pairs = [(options.pairs.parent / row["a"], options.pairs.parent / row["b"]) for row in rows]
    warnings.showwarning = lambda message, *_: print(f"left out: {message}", file=sys.stderr)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "score", "threshold", "same"])
        writer.writeheader()
        for row, e in zip(rows, xcos_ext.verify_many(pairs, model=options.model), strict=True):
            verdict = {} if e is None else {"score": e.score, "threshold": e.threshold, "same": int(bool(e))}
            writer.writerow(row | verdict)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
