"""Run the benchmarks of this folder that share a table, and write JSON and pictures.

    python -m benchmarks.run [--only decode,wires] [--out FOLDER] [--against FOLDER/results.json]

The exit status is 1 if a figure is out of bounds.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pictures import draw
from benchmarks.table import Measurement, load, save, show

PARTS = ("imports", "first_use", "decode", "wires", "accounts", "keys")


def measure(parts: list[str]) -> Iterator[Measurement]:
    """Yield the figures of each part."""
    for part in parts:
        yield from importlib.import_module(f"benchmarks.{part}").measure()


def main() -> None:
    """Measure, print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts to run")
    parser.add_argument("--out", type=Path, help="folder for results.json and the pictures")
    parser.add_argument("--against", type=Path, help="results.json of an earlier run, to compare with")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    measurements = show(measure(parts), load(options.against) if options.against else None)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        save(measurements, options.out / "results.json")
        for picture in draw(measurements, options.out):
            print(f"drew {picture}")
    sys.exit(not all(each.holds for each in measurements))


if __name__ == "__main__":
    main()
