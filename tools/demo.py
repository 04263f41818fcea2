# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run demo: build the package for CPython as pip would, and run the first example."""

from __future__ import annotations

import subprocess

from console import ROOT, clean_environment, run, say
from environments import Environment, ready


def main(arguments: list[str]) -> int:
    """Run examples/hello.py and return its exit status."""
    environment = Environment("cpython", "api")
    ready(environment)
    say("running examples/hello.py")
    example = ROOT / "examples" / "hello.py"
    return subprocess.run([environment.python, example], env=clean_environment()).returncode


if __name__ == "__main__":
    run(main)
