"""Run every transport through every scenario, and write the table in docs/transports.md.

    python -m tests.matrix [--only NAME] [--write]

The exit status is 1 if a transport fails unexpectedly, or passes a scenario that it is known to fail.
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
SCENARIO_TIMEOUT = 30  # seconds for one scenario
PASSED, FAILED, SKIPPED = "✓", "✗", "-"


def run_scenario(name: str, transport: Transport, *, verbose: bool) -> str:
    """Run one scenario on one transport, and return its mark in the table."""
    on_trio = name == "trio"
    if name in NETWORK and not transport.has_network:
        return SKIPPED
    if on_trio and not transport.has_trio:
        return SKIPPED

    async def run() -> None:
        with anyio.fail_after(SCENARIO_TIMEOUT):
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


def render_table(marks: dict[str, dict[str, str]]) -> str:
    """Render the marks as a Markdown table."""
    lines = ["| transport | passed | failed | notes |", "|---|---|---|---|"]
    for transport in TRANSPORTS:
        found = marks[transport.name]
        passed = sum(mark == PASSED for mark in found.values())
        tried = sum(mark != SKIPPED for mark in found.values())
        failed = "; ".join(name for name, mark in found.items() if mark == FAILED)
        lines.append(f"| {transport.name} | {passed} of {tried} | {failed} | {transport.note} |")
    scenarios = "; ".join(SCENARIOS)
    return "\n".join([*lines, "", f"The {len(SCENARIOS)} scenarios: {scenarios}.", ""])


def main() -> None:
    """Run the selected scenarios on the selected transports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="run only transports whose name contains this")
    parser.add_argument("--scenario", default="", help="run only scenarios whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="also show known failures")
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # raised by the libraries under test
    marks: dict[str, dict[str, str]] = {}
    surprises = 0
    for transport in TRANSPORTS:
        if options.only not in transport.name:
            continue
        found = marks[transport.name] = {
            name: run_scenario(name, transport, verbose=options.verbose)
            for name in SCENARIOS
            if options.scenario in name
        }
        failed = {name for name, mark in found.items() if mark == FAILED}
        for name in failed ^ (transport.fails & set(found)):
            surprises += 1
            print(f"    unexpected: {transport.name}: {name}: {found[name]}")
        print(transport.name, *found.values(), flush=True)
    if options.write and (options.only or options.scenario):
        parser.error("--write needs every transport and scenario")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{render_table(marks)}\n{END}{after}", encoding="utf-8")
    sys.exit(surprises > 0)


if __name__ == "__main__":
    main()
