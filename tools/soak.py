# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run soak: the test suite in its long form, and a table of what the tests counted."""

from __future__ import annotations

from check import WHOLE, check_here, closing_line
from console import LOGS, run, say, shown
from suite import Outcome

PYTEST = ("-v", "-o", "faulthandler_timeout=1800")  # a single test may take half an hour


def table(outcomes: list[Outcome]) -> list[str]:
    """A row for each figure and a column for each run; the last row says how long each took."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    rows = [("", *(f"{o.interpreter} {o.mode}" for o in outcomes))]
    rows += [(name, *(o.figures.get(name, "-") for o in outcomes)) for name in names]
    rows += [("minutes", *(f"{o.seconds / 60:.1f}" for o in outcomes))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def main(arguments: list[str]) -> int:
    """Run the suite, with further options for pytest; returns 1 if a test failed."""
    say(f"to follow the tests: tail -f {shown(LOGS)}/suite-*.log")
    outcomes = check_here(WHOLE, [*PYTEST, *arguments], {"NBD_SOAK": "1"})
    say("\n".join(table(outcomes)))
    say(closing_line(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    run(main)
