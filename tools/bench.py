# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run bench: benchmarks/run.py with our four environments and libnbd's own module."""

from __future__ import annotations

import os
import subprocess

from console import ROOT, clean_environment, run
from environments import ALL, ready

#: What benchmarks/run.py calls our environments.
NAMES = {"cpython-api": "api", "cpython-abi": "abi", "pypy-api": "pypy", "pypy-abi": "pypy-abi"}


def main(arguments: list[str]) -> int:
    """Measure; the options are those of benchmarks/run.py.  Returns its exit status."""
    for environment in ALL:
        ready(environment)
    python = os.environ["NBD_PYTHON"]
    ours = [f"{NAMES[environment.name]}={environment.python}" for environment in ALL]
    script = ROOT / "benchmarks" / "run.py"
    command = [python, str(script), *arguments, "libnbd=/usr/bin/python3", *ours]
    return subprocess.run(command, env=clean_environment(), check=False).returncode


if __name__ == "__main__":
    run(main)
