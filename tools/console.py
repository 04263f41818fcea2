# SPDX-License-Identifier: LGPL-2.0-or-later
"""How the commands of ./run speak: short lines on the terminal, long output in log files."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
LOGS = CACHE / "logs"
LAST_LINES = 25


class Failure(Exception):
    """A command cannot go on; one line that says what is missing and how to get it."""


def say(text: str) -> None:
    """Print a line at once, whatever standard output is."""
    print(text, flush=True)


def log_path(name: str) -> Path:
    """Where the output of a step goes."""
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{name}.log"


def shown(path: Path) -> str:
    """A path as short as it can be."""
    return str(path.relative_to(ROOT)) if ROOT in path.parents else str(path)


def show_end(log: Path) -> None:
    """Print the last lines of a log; if an interpreter crashed, the innermost frames instead."""
    lines = log.read_text(errors="replace").splitlines()
    crash = next((at for at, line in enumerate(lines) if "Fatal Python error" in line), len(lines))
    start = min(crash, max(len(lines) - LAST_LINES, 0))
    for line in lines[start : start + LAST_LINES]:
        say(f"    {line}")


def logged(
    log: Path,
    command: Sequence[object],
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> int:
    """Run a command whose output is appended to a log; returns its exit status."""
    words = [str(word) for word in command]
    with log.open("a") as file:
        file.write(f"$ {shlex.join(words)}\n")
        file.flush()
        try:
            return subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=cwd,
                timeout=timeout,
                check=False,
            ).returncode
        except FileNotFoundError as missing:
            file.write(f"{missing}\n")
            return 127
        except subprocess.TimeoutExpired:
            file.write(f"ended after {timeout} s\n")
            return 124


def must(
    log: Path,
    command: Sequence[object],
    failure: str,
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a logged command; Failure, after the end of its log, if it fails."""
    if logged(log, command, environ=environ, cwd=cwd) != 0:
        show_end(log)
        raise Failure(f"{failure} (log: {shown(log)})")


def output(command: Sequence[object], failure: str) -> str:
    """What a command prints, stripped; Failure if it cannot be run or fails."""
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=True, cwd="/"
        )
    except (OSError, subprocess.CalledProcessError) as reason:
        text = getattr(reason, "stderr", "") or str(reason)
        raise Failure(f"{failure}: {text.strip().splitlines()[-1]}") from None
    return done.stdout.strip()


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what would lead Python to other modules than the installed ones."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PYTHONNOUSERSITE": "1", **more}


def run(main: Callable[[list[str]], int]) -> None:
    """Run a command of ./run, and exit as it says."""
    try:
        sys.exit(main(sys.argv[1:]))
    except Failure as reason:
        sys.exit(f"run: {reason}")
    except KeyboardInterrupt:
        sys.exit(130)
