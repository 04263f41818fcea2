# SPDX-License-Identifier: LGPL-2.0-or-later
"""Output of the commands of ./run: short lines on the terminal, everything else in log files."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
LOGS = CACHE / "logs"
LAST_LINES = 25


class Failure(Exception):
    """A command has to stop; the message is one line that says why, and what to do about it."""


def say(text: str) -> None:
    """Print a line and flush it."""
    print(text, flush=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder against other threads and against commands of other checkouts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def log_path(name: str) -> Path:
    """The log file of a step."""
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{name}.log"


def new_log(name: str) -> Path:
    """The log file of a step, without what an earlier run has written."""
    log = log_path(name)
    log.unlink(missing_ok=True)
    return log


def shown(path: Path) -> str:
    """A path relative to the checkout, if it is inside."""
    return str(path.relative_to(ROOT)) if ROOT in path.parents else str(path)


def show_end(log: Path) -> None:
    """Print the last lines of a log, or the innermost frames if an interpreter crashed."""
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
    """Run a command, append its output to a log, and return its exit status."""
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
            file.write(f"stopped after {timeout} s\n")
            return 124


def must(
    log: Path,
    command: Sequence[object],
    failure: str,
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a logged command; if it fails, print the end of its log and raise Failure."""
    if logged(log, command, environ=environ, cwd=cwd) != 0:
        show_end(log)
        raise Failure(f"{failure} (log: {shown(log)})")


def output(command: Sequence[object], failure: str) -> str:
    """Return what a command prints, stripped; Failure if it fails or does not exist."""
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=True, cwd="/"
        )
    except (OSError, subprocess.CalledProcessError) as reason:
        text = getattr(reason, "stderr", "") or str(reason)
        raise Failure(f"{failure}: {text.strip().splitlines()[-1]}") from None
    return done.stdout.strip()


def clean_environment(**more: str) -> dict[str, str]:
    """The environment, without variables that make Python import other than installed modules."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PYTHONNOUSERSITE": "1", **more}


def run(main: Callable[[list[str]], int]) -> None:
    """Run the main function of a command, and exit with its status."""
    try:
        sys.exit(main(sys.argv[1:]))
    except Failure as reason:
        sys.exit(f"run: {reason}")
    except KeyboardInterrupt:
        sys.exit(130)
