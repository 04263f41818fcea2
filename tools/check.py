# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run check: the test suite on both interpreters and in both modes, here and in Debian roots."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from console import run, say
from environments import ALL, BRIEF, OF_WHEEL, ready
from suite import Outcome, run_suite

NEWER = ("trixie", "forky")  # what --all checks besides this machine
SUITES = ("bookworm", *NEWER)
COLUMNS = ("Debian", "libnbd", "interpreter", "mode", "passed", "skipped", "failed")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what follows -- is for pytest."""
    parser = argparse.ArgumentParser(prog="./run check")
    parser.add_argument("--root", action="append", default=[], metavar="SUITE", choices=SUITES)
    parser.add_argument("--all", action="store_true", help="here and in every root, and a table")
    parser.add_argument("--brief", action="store_true", help="CPython in API mode, PyPy in ABI")
    parser.add_argument("--wheel", type=Path, help="a wheel that has libnbd inside")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    options.pytest = arguments[at + 1 :]
    if options.wheel and not options.wheel.is_file():
        parser.error(f"{options.wheel} is missing; ./run dist makes wheels in dist/")
    return options


def check_here(
    options: Sequence[str], variables: dict[str, str], is_brief: bool = False
) -> list[Outcome]:
    """Run the suite in each environment, two at a time, PyPy's first: those take longest.

    One at a time if it is brief: then two roots do this at the same time.
    """
    environments = BRIEF if is_brief else ALL
    if "NBD_WHEEL" in os.environ:
        environments = OF_WHEEL
    with ThreadPoolExecutor(max_workers=1 if is_brief else 2) as pool:
        list(pool.map(ready, environments))
        say("running the tests")
        longest_first = sorted(environments, key=lambda one: one.interpreter != "pypy")
        running = {one: pool.submit(run_suite, one, options, variables) for one in longest_first}
        outcomes = [running[one].result() for one in environments]
    compare(outcomes)
    return outcomes


def check_roots(suites: Sequence[str], options: argparse.Namespace) -> list[Outcome]:
    """Run the suite in roots: two at a time, if each has only one run at a time."""
    from roots import check_in_root

    is_brief = options.brief or options.all
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(max_workers=2 if is_brief else 1) as pool:
        running = [
            pool.submit(check_in_root, suite, options.pytest, options.wheel, is_brief)
            for suite in suites
        ]
        for one in running:
            outcomes += one.result()
    return outcomes


def compare(outcomes: list[Outcome]) -> None:
    """Fail a run that has fewer tests than another run with the same libnbd: some were lost."""
    most = max(outcome.tests for outcome in outcomes)
    for outcome in outcomes:
        if outcome.tests < most and not outcome.failures:
            lost = f"{most - outcome.tests} tests of another interpreter or mode were not run"
            outcome.failures.append(lost)
            say(f"{outcome.interpreter} {outcome.mode}: {lost}")


def closing_line(outcomes: list[Outcome]) -> str:
    """The plain sum."""
    passed = sum(outcome.passed for outcome in outcomes)
    return f"{passed} passed, {sum(len(outcome.failures) for outcome in outcomes)} failed"


def debian_here() -> str:
    """The name of this machine's distribution, as short as it gives it."""
    release = Path("/etc/os-release")
    lines = release.read_text().splitlines() if release.is_file() else []
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return (fields.get("VERSION_CODENAME") or fields.get("ID") or "here").strip('"')


def table(outcomes: list[Outcome]) -> list[str]:
    """A line for each outcome under a heading; under it the reasons of what was skipped."""
    rows = [COLUMNS] + [
        (
            *(o.debian, o.libnbd, o.interpreter, o.mode),
            *(str(o.passed), str(sum(o.skipped.values())), str(len(o.failures))),
        )
        for o in outcomes
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    result = [lines[0]]
    for line, outcome in zip(lines[1:], outcomes):
        result += [line, *outcome.lines()[1:]]
    return result


def main(arguments: list[str]) -> int:
    """Run what is asked for; returns 1 if a test failed."""
    options = parse(arguments)
    outcomes: list[Outcome] = []
    if options.wheel:
        os.environ["NBD_WHEEL"] = str(options.wheel.resolve())
    if options.all or not options.root:
        outcomes += check_here(options.pytest, {}, options.brief)
    for outcome in outcomes:
        outcome.debian = debian_here()
    outcomes += check_roots(NEWER if options.all else options.root, options)
    if options.json:
        document = [dataclasses.asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps(document, indent=1))
    if options.all or options.root:
        say("\n".join(table(outcomes)))
    say(closing_line(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    run(main)
