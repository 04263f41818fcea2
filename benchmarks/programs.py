# SPDX-License-Identifier: LGPL-2.0-or-later
"""Run programs, and return their output or their times."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

TIMEOUT = 300  # seconds; a run takes less than one second


class RunError(Exception):
    """A child process failed or timed out."""


def call(command: list[str], cwd: Path | None = None) -> str:
    """Return a command's standard output; RunError, with its last line of errors, if it fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
    except FileNotFoundError as missing:
        raise RunError(str(missing)) from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]}: no answer after {TIMEOUT} s") from None
    except subprocess.CalledProcessError as failed:
        last = failed.stderr.strip().rpartition("\n")[2]
        raise RunError(f"{command[0]}: status {failed.returncode}: {last}") from None
    return done.stdout


def timed(command: list[str]) -> dict[str, float]:
    """Measure the wall and processor time of a command in seconds, and its peak memory."""
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.daemon = True  # Ctrl-C does not wait for it
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    if process.returncode:
        last = errors.strip().rpartition("\n")[2]
        raise RunError(f"{command[0]}: status {process.returncode}: {last}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"operations": 1, "wall": wall, "cpu": cpu, "max_rss_kib": usage.ru_maxrss}
