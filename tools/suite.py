# SPDX-License-Identifier: LGPL-2.0-or-later
"""The rooms of the test suite, each run with one interpreter and mode, and the outcomes."""

from __future__ import annotations

import json
import signal
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from console import ROOT, clean_environment, logged, new_log, output, say, show_end, shown
from environments import Environment

#: The folders of tests/, those that take longest first.
ROOMS = (
    *("robustness", "binding", "aio", "copy", "file", "queue"),
    *("shell", "packaging", "filesystem", "generator", "docs"),
)
TIMEOUT = 3600  # seconds; a room takes minutes
NO_TESTS = 5  # pytest's status where the options select none of the tests
#: PyPy's young objects have half of the processor's cache, and it collects the others when there is
#: eight times as much: more than a GiB on some machines, where tests that measure memory fail.
VARIABLES = {"PYPY_GC_NURSERY": "2M"}

_DESCRIBE = """
import json, platform, sys
import nbd
implementation = platform.python_implementation()
print(json.dumps({
    "interpreter": implementation.lower(),
    "version": ".".join(platform.python_version_tuple()[:2]) + getattr(sys, "abiflags", ""),
    "libnbd": nbd.__version__,
}))
"""


@dataclass
class Outcome:
    """The outcome of the suite, or of a part of it, in one environment."""

    interpreter: str  # "cpython 3.11"
    mode: str
    libnbd: str
    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # how often, by reason
    failures: list[str] = field(default_factory=list)
    unstable: list[str] = field(default_factory=list)  # failed, and passed when run again
    figures: dict[str, str] = field(default_factory=dict)  # what tests counted, by name
    seconds: float = 0
    debian: str = ""
    tests: dict[str, int] = field(default_factory=dict)  # how many were run, by room

    def add(self, room: str, part: Outcome) -> None:
        """Add the outcome of a room."""
        self.passed += part.passed
        self.skipped = dict(Counter(self.skipped) + Counter(part.skipped))
        self.failures += part.failures
        self.unstable += part.unstable
        self.seconds += part.seconds
        self.tests[room] = part.passed + sum(part.skipped.values()) + len(part.failures)
        for name, value in part.figures.items():
            add_figure(name, value, self.figures)

    def lines(self) -> list[str]:
        """The summary, then the reasons of what was skipped, then what failed."""
        skips = f", {sum(self.skipped.values())} skipped"
        failed = f", {len(self.failures)} failed" if self.failures else ""
        head = f"{self.interpreter} {self.mode}: {self.passed} passed{skips}{failed}"
        reasons = sorted(folded(self.skipped).items(), key=lambda item: (-item[1], item[0]))
        return [
            head,
            *(f"    {count} skipped: {reason}" for reason, count in reasons),
            *(f"    failed, and passed when run again: {name}" for name in self.unstable),
            *(f"    failed: {name}" for name in self.failures),
        ]


def folded(skipped: dict[str, int]) -> dict[str, int]:
    """The same reasons, with one for everything that this libnbd lacks."""
    counts: Counter[str] = Counter()
    lacking: dict[str, list[str]] = {}
    for reason, count in skipped.items():
        who, has_no, what = reason.partition(" has no ")
        if has_no and what.isidentifier():
            lacking.setdefault(who, []).append(what)
            counts[who] += count
        else:
            counts[reason] += count
    for who, names in lacking.items():
        counts[f"{who} has no {', '.join(sorted(names))}"] = counts.pop(who)
    return counts


def add_figure(name: str, value: str, figures: dict[str, str]) -> None:
    """Add what a test counted; what several tests count under one name is summed up."""
    figures[name] = str(int(figures[name]) + int(value)) if name in figures else value


def read_report(report: Path, outcome: Outcome) -> None:
    """Count what pytest's XML report says."""
    skipped: Counter[str] = Counter()
    root = ElementTree.parse(report).getroot()
    outcome.seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    for case in root.iter("testcase"):
        for one in case.iter("property"):
            add_figure(one.get("name", ""), one.get("value", ""), outcome.figures)
        bad = case.find("failure") is not None or case.find("error") is not None
        skip = case.find("skipped")
        if bad:
            module = (case.get("classname") or "").rpartition(".")[2]
            name = f"{module}::{case.get('name')}"
            if name not in outcome.failures:  # its teardown may have failed as well
                outcome.failures.append(name)
        elif skip is not None:
            skipped[skip.get("message") or "no reason"] += 1
        else:
            outcome.passed += 1
    outcome.skipped = dict(skipped)


def described(environment: Environment) -> Outcome:
    """An empty outcome for an environment, by what it says of itself."""
    text = output([environment.python, "-c", _DESCRIBE], f"{environment.name} does not work")
    found = json.loads(text)
    interpreter = f"{found['interpreter']} {found['version']}"
    return Outcome(interpreter, environment.mode, found["libnbd"])


def excuse_unstable(outcome: Outcome, again: Path) -> None:
    """Move failures to the unstable tests that have passed when they were run again.

    Several suites run at a time, so a test that bounds a wait may be late.  PyPy may also run a
    signal handler inside a finalizer, which loses its exception.
    """
    second = Outcome(outcome.interpreter, outcome.mode, outcome.libnbd)
    if again.is_file():
        read_report(again, second)
    passed = [name for name in outcome.failures if name not in second.failures]
    if second.passed >= len(passed):
        outcome.failures, outcome.unstable = second.failures, passed
        outcome.passed += len(passed)


def run_room(
    environment: Environment, room: str, options: Sequence[str], variables: dict[str, str]
) -> Outcome:
    """Run the tests of a room in an environment, from a folder that holds nothing."""
    outcome = Outcome(environment.interpreter, environment.mode, "")
    log = new_log(f"suite-{environment.name}-{room}")
    with tempfile.TemporaryDirectory(prefix="nbd-check-") as name:
        first, again, empty = (Path(name, one) for one in ("first.xml", "again.xml", "empty"))
        empty.mkdir()

        def pytest(report: Path, *more: str) -> int:
            command = [
                *(environment.folder / "bin" / "pytest", "-c", ROOT / "setup.cfg", "--tb=short"),
                *("-o", f"cache_dir={name}/cache", f"--junitxml={report}", *more, *options),
                ROOT / "tests" / room,
            ]
            environ = clean_environment(NBD_CHECKOUT=str(ROOT), **VARIABLES, **variables)
            return logged(log, command, environ=environ, cwd=empty, timeout=TIMEOUT)

        status = pytest(first)
        if first.is_file():
            read_report(first, outcome)
        if outcome.failures:
            show_end(log)
            pytest(again, "--last-failed")
            excuse_unstable(outcome, again)
        elif status not in (0, NO_TESTS) and not outcome.failures:
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            outcome.failures.append(f"pytest itself, in {room}: {how}")
    if outcome.failures:
        show_end(log)
        say(f"    (log: {shown(log)})")
    say(f"    {environment.name} {room}: {outcome.passed} passed in {outcome.seconds:.0f} s")
    return outcome
