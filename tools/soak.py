# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run soak: the test suite, as check_here runs it, with the counts of a long run."""

from __future__ import annotations

from check import check_here, closing_line
from console import run, say


def main(arguments: list[str]) -> int:
    """Run the suite, with options for pytest if there are any; returns 1 if a test failed."""
    outcomes = check_here(arguments, {"NBD_SOAK": "1"})
    say(closing_line(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    run(main)
