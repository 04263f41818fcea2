# SPDX-License-Identifier: LGPL-2.0-or-later
"""Compare this package with libnbd's own module, with C, and with another commit.

Usage: run.py [options] NAME=PYTHON...

Each NAME=PYTHON is an interpreter that can import nbd.  The names libnbd, base, api, abi, pypy and
pypy-abi are compared with each other as results.py says; any other name is compared with libnbd.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import plan
import report
from exports import running
from plan import Workload
from programs import RunError, call
from results import Results
from subjects import (
    Subject,
    interpreter,
    limit_subject,
    nbdcopy_subjects,
    python_subject,
)

Step = tuple[int, Workload, Subject]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare nbd with libnbd's own module and C.")
    parser.add_argument("subjects", nargs="+", type=interpreter, metavar="NAME=PYTHON")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, 3 rounds")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--stat", choices=("median", "min"), default="median")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 7)
    return options


def progress(message: str) -> None:
    """Report progress on standard error; on a terminal, in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
    else:
        print(message, file=sys.stderr, flush=True)


def gather(pairs: list[tuple[str, str]], folder: Path) -> list[Subject]:
    """Return the subjects of the command line, and C and nbdcopy where they are installed."""
    subjects = []
    try:
        subjects.append(limit_subject(folder))
    except RunError as reason:
        progress(f"C is left out: {reason}\n")
    for name, python in pairs:
        subjects.append(python_subject(name, python, folder))
    return subjects + nbdcopy_subjects()


def steps(workloads: list[Workload], subjects: list[Subject], rounds: int) -> Iterator[Step]:
    """Yield every run; the subjects alternate, in a different order each time."""
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        for workload in workloads:
            turn = [s for s in subjects if s.runs(workload)]
            shuffle(turn)
            for subject in turn:
                yield number, workload, subject


def touch_memory(workload: Workload) -> None:
    """Allocate and free as much memory as a run can need.

    A virtual machine may have returned free memory to its host.  The next use of that memory costs
    many times an ordinary page fault, and must not be charged to one of the subjects.
    """
    if workload.fresh_bytes:
        call([sys.executable, "-c", f"b'x' * {workload.fresh_bytes}"])


def measure(
    workloads: list[Workload], subjects: list[Subject], uris: dict[str, str], rounds: int, stat: str
) -> tuple[Results, dict[str, str]]:
    """Run everything; return the results, and the reason of each failed run."""
    results = Results(workloads, subjects, stat)
    failures: dict[str, str] = {}
    todo = list(steps(workloads, subjects, rounds))
    for done, (number, workload, subject) in enumerate(todo):
        what = f"{workload.name} {subject.name}"
        progress(f"[{done + 1}/{len(todo)}] round {number + 1} of {rounds}: {what}")
        sample = None
        try:
            touch_memory(workload)
            sample = subject.run(workload, uris)
        except RunError as reason:
            failures[what] = str(reason)
        results.add(workload, subject.name, sample)
    progress("" if sys.stderr.isatty() else "done")
    return results, failures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and return 1 if a run failed."""
    options = parse(arguments)
    workloads = plan.workloads(options.only, options.quick)
    names = {server for w in workloads for server in w.servers} - {"target", "file"}
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as temporary:
        folder = Path(temporary)
        subjects = gather(options.subjects, folder)
        with running(names, plan.memory_size(workloads), folder) as uris:
            filler = next(s for s in subjects if "python" in s.about)
            for fill in plan.fills(names, plan.memory_size(workloads)):
                filler.run(fill, uris)
            results, failures = measure(workloads, subjects, uris, options.rounds, options.stat)
    print(report.text(results, options.rounds))
    for what, reason in failures.items():
        print(f"failed: {what}: {reason}", file=sys.stderr)
    if options.json:
        document = report.document(results, options.rounds)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
