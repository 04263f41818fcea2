"""Programs that a test runs in a process of their own, with this interpreter."""

from __future__ import annotations

import subprocess
import sys

from servers import PATIENCE


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the text of a Python program, for which every warning is an error."""
    command = [sys.executable, "-W", "error", "-I", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE)
