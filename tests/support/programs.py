"""Programs that a test runs in a process of their own, with this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.servers import TIMEOUT

TESTS = Path(__file__).resolve().parent.parent


def finds_support() -> dict[str, str]:
    """Return the environment of a program that imports `support`, as the tests do."""
    return {**os.environ, "PYTHONPATH": str(TESTS)}


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the text of a Python program, for which every warning is an error."""
    command = [sys.executable, "-W", "error", "-I", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * TIMEOUT)
