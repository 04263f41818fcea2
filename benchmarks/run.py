# SPDX-License-Identifier: LGPL-2.0-or-later
"""Compare this package with libnbd's own module, with C, with nbdcopy, and with another commit.

Usage: run.py [options] NAME=PYTHON...

Each NAME=PYTHON is an interpreter that can import nbd.  The names libnbd, base, api, abi, pypy and
pypy-abi are compared with each other as results.py says; any other name is compared with libnbd.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import copies
import plan
import readers
import report
from exports import running
from plan import Workload
from programs import RunError, call
from results import Results
from subjects import HERE, Subject, copier_subjects, interpreter, limit_subject, python_subject


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare nbd with libnbd's own module and C.")
    parser.add_argument("subjects", nargs="+", type=interpreter, metavar="NAME=PYTHON")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, 3 rounds")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    parser.add_argument("--libraries", help="the folder of modules that readers.py needs")
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
    """Return the subjects of the command line, and the programs that are installed."""
    subjects = [python_subject(name, python, folder) for name, python in pairs]
    try:
        subjects.insert(0, limit_subject(folder))
    except RunError as reason:
        progress(f"C is left out: {reason}\n")
    return subjects + copier_subjects()


def steps(
    workloads: list[Workload], subjects: list[Subject], rounds: int
) -> Iterator[tuple[int, Workload, Subject]]:
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
    workloads: list[Workload], subjects: list[Subject], uris: dict[str, str], rounds: int
) -> tuple[Results, dict[str, str]]:
    """Run everything; return the results, and the reason of each failed run."""
    results = Results(workloads, subjects, rounds)
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
    return results, failures


def measure_readers(options: argparse.Namespace, results: Results) -> dict[str, str]:
    """Run the readers of readers.py; returns the reason of each that failed."""
    failures = {}
    python = dict(options.subjects).get("api")
    for name in readers.READERS:
        if python and options.libraries and plan.is_chosen(name, options.only):
            progress(name)
            try:
                results.readers[name] = readers.measure(name, python, options.libraries)
            except RunError as reason:
                failures[name] = str(reason)
    return failures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and return 1 if a run failed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the servers then, too
    workloads = plan.workloads(options.only, options.quick)
    size = plan.memory_size(workloads)
    names = {server for w in workloads for server in w.servers} - {"target", "file", "qcow2"}
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as temporary:
        folder = Path(temporary)
        subjects = gather(options.subjects, folder)
        made = {"gzip": copies.archive(folder / "disk.gz", size)} if "gzip" in names else {}
        # The archive has the contents of the disk "half".
        names = names - {"gzip"} | {"half" for _ in made}
        with running(names, size, folder) as uris:
            uris.update(made)
            filler = next(s for s in subjects if "python" in s.about)
            for fill in plan.fills(names, size):
                filler.run(fill, uris)
            results, failures = measure(workloads, subjects, uris, options.rounds)
    failures.update(measure_readers(options, results))
    print("\n".join(report.about(results)), report.text(results), sep="\n")
    for what, reason in failures.items():
        print(f"failed: {what}: {reason}", file=sys.stderr)
    if options.write:
        report.write(HERE, results)
    if options.json:
        options.json.write_text(json.dumps(report.document(results)), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
