# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run check: the test suite on both interpreters and in both modes, here and in Debian roots.

Each environment runs the rooms of the suite in which only it can fail: see planned().
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from console import run, say
from environments import ALL, FREE_THREADED, OF_WHEEL, Environment, ready
from suite import ROOMS, Outcome, described, run_room

Plan = dict[Environment, tuple[str, ...]]

CPYTHON_API, CPYTHON_ABI, PYPY_API, PYPY_ABI = ALL
#: What only a mode can break is below the methods: how the shim is loaded, called and calls back.
_OF_THE_MODE = ("binding", "packaging")
#: What only an interpreter can break: its buffers, collector, io, asyncio, threads and exit.
_OF_THE_INTERPRETER = (
    *("robustness", "binding", "aio", "copy", "file", "queue", "shell", "filesystem"),
)

#: What only a version of CPython can break above the extension module, which has the limited API.
_OF_THE_VERSION = ("binding", "aio", "shell")

#: Large packages that open disks by URL need an environment of their own, and only one.
ECOSYSTEM = Environment("cpython", "api", "ecosystem")

#: What `./run check` runs.
PLAN: Plan = {
    CPYTHON_API: ROOMS,
    CPYTHON_ABI: _OF_THE_MODE,
    PYPY_API: _OF_THE_INTERPRETER,
    PYPY_ABI: _OF_THE_MODE,
    ECOSYSTEM: ("ecosystem",),
}
#: What `./run check --all` runs in a root, whose interpreters and libnbd are newer; in the newest
#: root, where another CPython is beside Debian's own, that one takes the place of it.
PLAN_OF_ROOT: Plan = {CPYTHON_API: ROOMS, PYPY_ABI: ("binding", "shell")}
PLAN_OF_NEWEST_ROOT: Plan = {CPYTHON_API: _OF_THE_VERSION, PYPY_ABI: _OF_THE_INTERPRETER}
#: What `./run check --whole` runs.
WHOLE: Plan = dict.fromkeys(ALL, ROOMS)
OF_WHEELS: Plan = dict.fromkeys(OF_WHEEL, ROOMS)
#: What `./run check --free-threaded` runs.
WITHOUT_GIL: Plan = {
    Environment(FREE_THREADED, mode, FREE_THREADED): _OF_THE_INTERPRETER for mode in ("api", "abi")
}

NEWER = ("trixie", "forky")  # what --all checks besides this machine
SUITES = ("bookworm", *NEWER)
COLUMNS = ("Debian", "libnbd", "interpreter", "mode", "passed", "skipped", "failed")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what follows -- is for pytest."""
    parser = argparse.ArgumentParser(prog="./run check")
    parser.add_argument("--root", action="append", default=[], metavar="SUITE", choices=SUITES)
    parser.add_argument("--all", action="store_true", help="here and in every root, and a table")
    parser.add_argument("--whole", action="store_true", help="every test in every environment")
    parser.add_argument("--free-threaded", action="store_true", help="on CPython without the GIL")
    parser.add_argument("--beside", metavar="PYTHON", help="run this CPython, too: python3.15")
    parser.add_argument("--as-root", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--wheel", type=Path, help="a wheel that has libnbd inside")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    options.pytest = arguments[at + 1 :]
    if options.wheel and not options.wheel.is_file():
        parser.error(f"{options.wheel} is missing; ./run dist makes wheels in dist/")
    return options


def planned(options: argparse.Namespace) -> Plan:
    """What is to be run here."""
    beside = {"api": ROOMS, "abi": _OF_THE_MODE}
    if options.free_threaded:
        return WITHOUT_GIL
    if "NBD_WHEEL" in os.environ:
        plan, beside = OF_WHEELS, {"wheel": ROOMS}
    elif options.whole:
        plan, beside = WHOLE, dict.fromkeys(beside, ROOMS)
    elif options.as_root:
        plan = PLAN_OF_NEWEST_ROOT if options.beside else PLAN_OF_ROOT
    else:
        plan = PLAN
    if not options.beside:
        return plan
    return {**{Environment(options.beside, mode): beside[mode] for mode in beside}, **plan}


def check_here(plan: Plan, options: Sequence[str], variables: dict[str, str]) -> list[Outcome]:
    """Run rooms in environments, some at a time, as tests wait more than they compute.

    PyPy's rooms come first: they take longest.
    """
    with ThreadPoolExecutor(max_workers=(os.cpu_count() or 1) + 1) as pool:
        list(pool.map(ready, plan))
        outcomes = {environment: described(environment) for environment in plan}
        say("running the tests")
        longest_first = sorted(plan, key=lambda one: one.interpreter != "pypy")
        running = {
            pool.submit(run_room, environment, room, options, variables): (environment, room)
            for room in (*ROOMS, "ecosystem")
            for environment in longest_first
            if room in plan[environment]
        }
        for done in as_completed(running):
            environment, room = running[done]
            outcomes[environment].add(room, done.result())
    result = list(outcomes.values())
    compare(result)
    for outcome in result:
        say("\n".join(outcome.lines()))
    return result


def check_roots(suites: Sequence[str], options: argparse.Namespace) -> list[Outcome]:
    """Run the suite in roots, two at a time."""
    from roots import check_in_root

    flags = ["--whole"] if options.whole else ["--as-root"] if options.all else []
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [
            pool.submit(check_in_root, suite, flags, options.pytest, options.wheel)
            for suite in suites
        ]
        for one in running:
            outcomes += one.result()
    return outcomes


def compare(outcomes: list[Outcome]) -> None:
    """Fail a run that has fewer tests of a room than another run of it: some were lost."""
    for room in ROOMS:
        most = max(outcome.tests.get(room, 0) for outcome in outcomes)
        for outcome in outcomes:
            if outcome.tests.get(room, most) < most and not outcome.failures:
                outcome.failures.append(
                    f"{room}: {most - outcome.tests[room]} tests that another interpreter or mode "
                    "has were not run"
                )


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
        outcomes += check_here(planned(options), options.pytest, {})
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
