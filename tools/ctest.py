# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run ctest: the C tests of the shim (tests/c/run), by default with AddressSanitizer.

The options are those of tests/c/run: plain, asan (with UndefinedBehaviorSanitizer), tsan, valgrind.
"""

from __future__ import annotations

import os
import subprocess

from console import ROOT, clean_environment, run
from environments import Environment, base_interpreter, venv


def main(arguments: list[str]) -> int:
    """Run them with a Python that has the generator's requirements; returns their exit status."""
    environment = Environment("cpython", "abi")
    venv(environment.folder, base_interpreter(environment.interpreter), "suite")
    environ = clean_environment(PYTHON=str(environment.python), CC=os.environ.get("CC", "gcc"))
    command = [str(ROOT / "tests" / "c" / "run"), *(arguments or ["asan"])]
    return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    run(main)
