"""Draws the figures of the documentation from benchmarks/results/models.csv.

python benchmarks/plot.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from threshnet_fast.cli.errors import CommandError
from threshnet_fast.cli.report import on_gpu, plot
from threshnet_fast.cli.results import latest_rows, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.csv"
FIGURE = ROOT / "docs" / "figures" / "latency.png"


def main() -> int:
    """Draws ThreshNet95 on a CPU with the most threads that were measured, one panel an input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--model", default="threshnet95")
    parser.add_argument("--output", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    try:
        rows = [
            row
            for row in latest_rows(read_rows(arguments.csv))
            if row["model"] == arguments.model and not on_gpu(row)
        ]
        threads = max((int(row["threads"]) for row in rows), default=0)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        plot([row for row in rows if int(row["threads"]) == threads], arguments.output)
    except CommandError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
