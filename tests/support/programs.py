"""Run Python programs in a process of their own, with the interpreter of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.servers import TIMEOUT

TESTS = Path(__file__).resolve().parent.parent


def finds_support() -> dict[str, str]:
    """Return an environment in which a program can import `support`, as the tests do."""
    return {**os.environ, "PYTHONPATH": str(TESTS)}


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the text of a Python program, in which every warning is an error."""
    command = [sys.executable, "-W", "error", "-I", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * TIMEOUT)


def output_of(program: str, *arguments: str) -> str:
    """Run a program, which must succeed and write nothing to stderr; return its output."""
    done = run_program(program, *arguments)
    if done.returncode != 0 or done.stderr:
        pytest.fail(f"status {done.returncode}, and on standard error:\n{done.stderr}")
    return done.stdout


def run_silently(program: str, *arguments: str) -> None:
    """Run a program, which must exit with status 0 and print nothing."""
    assert output_of(program, *arguments) == ""
