# SPDX-License-Identifier: LGPL-2.0-or-later
"""Count the instructions of one operation, and of the import; the machine's load does not matter.

Usage: instructions.py NAME=PYTHON...

callgrind runs each workload twice, with different numbers of operations.  The difference of the
counts, divided by the difference of the operations, excludes the start and the end of the program.
The import is measured as the difference between a program that imports nbd and an empty one.
Instructions in the kernel, page faults included, are not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import plan
from exports import running
from plan import Workload
from programs import RunError
from report import align
from subjects import HERE, compile_limit, interpreter

SHORT, LONG = 500, 2_500
WORKLOADS = ["pread-512", "aio-pread-4k"]
ENVIRONMENT = {
    **os.environ,
    # Both runs must iterate over sets of str in the same order.
    "PYTHONHASHSEED": "0",
    # callgrind counts `rep stosb` once for every byte: let memset use vectors at any size.
    "GLIBC_TUNABLES": "glibc.cpu.x86_rep_stosb_threshold=0x40000000",
}


def count(command: list[str], folder: Path) -> int:
    """Count all instructions that a command executes in user space."""
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/callgrind.out"]
    done = subprocess.run(
        [*valgrind, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not collected:
        raise RunError(f"{command[0]}: status {done.returncode}\n{done.stderr}")
    return int(collected.group(1))


def per_operation(
    program: list[str], workload: Workload, uris: dict[str, str], folder: Path
) -> float:
    """Count the instructions of one operation."""
    short, long = (
        count([*program, *plan.of_length(workload, operations).arguments(uris)], folder)
        for operations in (SHORT, LONG)
    )
    return (long - short) / (LONG - SHORT)


def of_import(python: str, folder: Path) -> int:
    """Count the instructions of `import nbd`."""
    return count([python, "-c", "import nbd"], folder) - count([python, "-c", "pass"], folder)


def main(arguments: list[str]) -> None:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(description="Count instructions per operation.")
    parser.add_argument("subjects", nargs="+", type=interpreter, metavar="NAME=PYTHON")
    pairs = parser.parse_args(arguments).subjects
    script = str(HERE / "workloads.py")
    rows = [["instructions per operation", *WORKLOADS, "import"]]
    interpreters = dict(pairs)
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as temporary:
        folder = Path(temporary)
        programs = {"C": [str(compile_limit(folder))]}
        programs.update((name, [python, script]) for name, python in pairs)
        with running({"null"}, 0, folder) as uris:
            for name, program in programs.items():
                print(f"callgrind: {name}", file=sys.stderr)
                counts = [
                    per_operation(program, workload, uris, folder)
                    for workload in plan.workloads(WORKLOADS, quick=False)
                ]
                cells = [f"{number:,.0f}" for number in counts]
                is_python = name in interpreters
                cells.append(f"{of_import(interpreters[name], folder):,}" if is_python else "-")
                rows.append([name, *cells])
    print("\n".join(align(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
