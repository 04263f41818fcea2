# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run bench: compare this tree with libnbd's own module and, by --base, with another commit.

Other options are those of benchmarks/run.py.  A whole run writes its tables into
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from console import CACHE, ROOT, Failure, clean_environment, must, new_log, run, say
from environments import ALL, ready, venv

#: The names of our environments in the tables.
NAMES = {"cpython-api": "api", "cpython-abi": "abi", "pypy-api": "pypy", "pypy-abi": "pypy-abi"}


def base(commit: str) -> Path:
    """Build a commit for CPython in API mode; returns the Python that has it installed."""
    folder = CACHE / "environments" / "base"
    venv(folder, os.environ["NBD_PYTHON"], "suite")
    log = new_log("package-base")
    say(f"base: building the package of {commit}")
    with tempfile.TemporaryDirectory(prefix="nbd-base-") as sources:
        archive = ["git", "-C", str(ROOT), "archive", commit]
        packed = subprocess.run(archive, stdout=subprocess.PIPE, check=False)
        if packed.returncode != 0:
            raise Failure(f"git cannot read the commit {commit}")
        subprocess.run(["tar", "-xC", sources], input=packed.stdout, check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--force-reinstall"]
        must(
            log,
            [*pip, "--no-build-isolation", sources],
            f"the package of {commit} does not build",
            environ=clean_environment(NBD_CFFI_MODE="api"),
        )
    return folder / "bin" / "python"


def main(arguments: list[str]) -> int:
    """Measure; returns the exit status of the benchmark."""
    parser = argparse.ArgumentParser(prog="./run bench", add_help=False)
    parser.add_argument("--base")
    options, rest = parser.parse_known_args(arguments)
    for environment in ALL:
        ready(environment)
    readers = CACHE / "environments" / "readers"
    venv(readers, os.environ["NBD_PYTHON"], "readers")
    (libraries,) = readers.glob("lib/python3*/site-packages")
    rest.append(f"--libraries={libraries}")
    subjects = [f"{NAMES[environment.name]}={environment.python}" for environment in ALL]
    if options.base:
        subjects.insert(0, f"base={base(options.base)}")
    elif not any(option.startswith(("--only", "--quick")) for option in rest):
        rest.append("--write")
    script = str(ROOT / "benchmarks" / "run.py")
    command = [os.environ["NBD_PYTHON"], script, *rest, "libnbd=/usr/bin/python3", *subjects]
    return subprocess.run(command, env=clean_environment(), check=False).returncode


if __name__ == "__main__":
    run(main)
