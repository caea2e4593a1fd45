"""Tries every transport in every scenario, and writes the table in docs/transports.md.

    python -m tests.matrix [--only NAME] [--write]

Exits with 1 if a transport fails where it should not, or passes where the table says that it cannot.
"""

import argparse
import sys
import traceback
import warnings
from pathlib import Path

import anyio

from .scenarios import NETWORK, SCENARIOS
from .transports import TRANSPORTS, Transport

PAGE = Path(__file__).parents[2] / "docs" / "transports.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
PATIENCE = 30  # seconds for one scenario
PASSED, FAILED, LEFT_OUT = "✓", "✗", "-"


def try_one(name: str, transport: Transport, *, verbose: bool) -> str:
    """Run one scenario on one transport; return the mark for it."""
    on_trio = name == "trio"
    if name in NETWORK and not transport.has_network:
        return LEFT_OUT
    if on_trio and not transport.has_trio:
        return LEFT_OUT

    async def run() -> None:
        with anyio.fail_after(PATIENCE):
            await SCENARIOS[name](transport)

    try:
        anyio.run(run, backend="trio" if on_trio else "asyncio")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        if verbose or name not in transport.fails:
            traceback.print_exc()
        return FAILED
    return PASSED


def table(marks: dict[str, dict[str, str]]) -> str:
    """Return the table."""
    lines = ["| transport | passes | does not pass | what to know |", "|---|---|---|---|"]
    for transport in TRANSPORTS:
        found = marks[transport.name]
        passed = sum(mark == PASSED for mark in found.values())
        tried = sum(mark != LEFT_OUT for mark in found.values())
        failed = "; ".join(name for name, mark in found.items() if mark == FAILED)
        lines.append(f"| {transport.name} | {passed} of {tried} | {failed} | {transport.note} |")
    scenarios = "; ".join(SCENARIOS)
    return "\n".join([*lines, "", f"The {len(SCENARIOS)} scenarios: {scenarios}.", ""])


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name of one transport")
    parser.add_argument("--scenario", default="", help="a part of the name of one scenario")
    parser.add_argument("--verbose", action="store_true", help="show known failures, too")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # those of the libraries that are tried
    marks: dict[str, dict[str, str]] = {}
    surprises = 0
    for transport in TRANSPORTS:
        if options.only not in transport.name:
            continue
        found = marks[transport.name] = {
            name: try_one(name, transport, verbose=options.verbose)
            for name in SCENARIOS
            if options.scenario in name
        }
        failed = {name for name, mark in found.items() if mark == FAILED}
        for name in failed ^ (transport.fails & set(found)):
            surprises += 1
            print(f"    unexpected: {transport.name}: {name}: {found[name]}")
        print(transport.name, *found.values(), flush=True)
    if options.write and (options.only or options.scenario):
        parser.error("--write needs all of them")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(marks)}\n{END}{after}", encoding="utf-8")
    sys.exit(surprises > 0)


if __name__ == "__main__":
    main()
