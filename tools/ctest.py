# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run ctest: the C tests of the shim, under AddressSanitizer and UndefinedBehaviorSanitizer.

Every tests/c/test_*.c is a program, linked with the other C files there, the shim and the glue.
A program prints `ok NAME` or `not ok NAME` for each of its tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from console import (
    CACHE,
    ROOT,
    clean_environment,
    log_path,
    logged,
    must,
    output,
    run,
    say,
    show_end,
    shown,
)
from environments import Environment, ready
from generated import generate

TESTS = ROOT / "tests" / "c"
SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WARNINGS = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
TIMEOUT = 300  # seconds, for one program


def programs(folder: Path, python: Path) -> Iterator[Path]:
    """Build each test program."""
    log = log_path("ctest-build")
    log.unlink(missing_ok=True)
    glue = generate(python, "abi")
    must(log, [python, TESTS / "every_call.py", folder], "every_call.py failed")
    includes = [f"-I{path}" for path in (TESTS, ROOT / "csrc", glue, folder)]
    compiler = [os.environ.get("CC", "gcc"), *WARNINGS, *SANITIZED, *includes]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        must(log, [*compiler, "-c", source, "-o", target], f"{source.name} does not compile")
        return target

    helpers = [c for c in sorted(TESTS.glob("*.c")) if not c.name.startswith("test_")]
    shared = [compiled(c) for c in (*helpers, ROOT / "csrc" / "nbdshim.c", glue / "nbdglue.c")]
    library = output(["pkg-config", "--libs", "libnbd"], "libnbd is missing").split()
    for test in sorted(TESTS.glob("test_*.c")):
        program = folder / test.stem
        link = [*compiler, compiled(test), *shared, "-o", program, "-pthread", *library]
        must(log, link, f"{test.name} cannot be linked")
        yield program


def run_program(program: Path) -> tuple[int, int]:
    """Run a test program; returns how many of its tests passed and failed."""
    log = log_path(f"ctest-{program.name}")
    log.unlink(missing_ok=True)
    status = logged(log, [program], environ=clean_environment(**OPTIONS), timeout=TIMEOUT)
    lines = log.read_text(errors="replace").splitlines()
    passed = sum(line.startswith("ok ") for line in lines)
    failed = sum(line.startswith("not ok ") for line in lines)
    if status != 0 or failed or not passed:
        failed = max(failed, 1)
        show_end(log)
        say(f"    status {status} (log: {shown(log)})")
    say(f"{program.name}: {passed} passed, {failed} failed")
    return passed, failed


def main(arguments: list[str]) -> int:
    """Build and run all of them; returns 1 if one failed."""
    environment = Environment("cpython", "abi")
    ready(environment)
    folder = CACHE / "ctest"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = [run_program(program) for program in programs(folder, environment.python)]
    passed, failed = (sum(column) for column in zip(*results))
    say(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
