# SPDX-License-Identifier: LGPL-2.0-or-later
"""The distributions that use the system's libnbd: the sdist, and wheels that are built from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from console import ROOT, clean_environment, log_path, must
from environments import Environment, tools

DIST = ROOT / "dist"
NOT_IN_SDIST = shutil.ignore_patterns(
    ".git", ".cache", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so"
)
# Debug information has the names of temporary folders.
SAME_BYTES = {"CFLAGS": "-g0"}


def set_time() -> None:
    """Give the files in distributions the time of the commit, so that their bytes depend on it."""
    if "SOURCE_DATE_EPOCH" not in os.environ:
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        os.environ["SOURCE_DATE_EPOCH"] = done.stdout.strip() or "1000000000"


def newest(pattern: str) -> Path:
    """The one file in dist/ of a pattern."""
    (found,) = DIST.glob(pattern)
    return found


def build_sdist() -> Path:
    """Build the sdist as anybody's tool does, in an isolated environment."""
    log = log_path("dist-sdist")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbd-sdist-") as name:
        folder = Path(name, "source")
        shutil.copytree(ROOT, folder, ignore=NOT_IN_SDIST)
        command = [tools("dist") / "python", "-m", "build", "--sdist", "--outdir", DIST, folder]
        must(log, command, "the sdist cannot be built", environ=clean_environment())
    return newest("*.tar.gz")


def build_wheel(sdist: Path, environment: Environment) -> Path:
    """Build a wheel from the sdist alone, with an interpreter and in a mode."""
    log = log_path(f"dist-wheel-{environment.name}")
    log.unlink(missing_ok=True)
    before = set(DIST.glob("*.whl"))
    pip = [environment.python, "-m", "pip", "wheel", "--no-input", "--no-deps"]
    must(
        log,
        [*pip, "--wheel-dir", DIST, sdist],
        f"no wheel for {environment.name}",
        environ=clean_environment(NBD_CFFI_MODE=environment.mode, **SAME_BYTES),
        cwd=Path("/"),
    )
    (built,) = set(DIST.glob("*.whl")) - before
    return built
