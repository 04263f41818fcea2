# SPDX-License-Identifier: LGPL-2.0-or-later
"""The distributions that use the system's libnbd: the sdist, and wheels built from it."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from console import ROOT, Failure, clean_environment, must, new_log, output
from environments import Environment, tools

DIST = ROOT / "dist"
# A folder apart for wheels without libnbd: pip would prefer them, and they only fit this system.
FOR_SYSTEM = DIST / "this-system"
NOT_IN_SDIST = shutil.ignore_patterns(
    ".git", ".cache", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so"
)
# Without debug information, which contains the names of temporary folders.
SAME_BYTES = {"CFLAGS": "-g0"}


def set_time() -> None:
    """Set the time of all files in distributions to that of the commit, for reproducible builds."""
    if "SOURCE_DATE_EPOCH" not in os.environ:
        command = ["git", "-C", ROOT, "log", "-1", "--format=%ct"]
        try:
            os.environ["SOURCE_DATE_EPOCH"] = output(command, "the commit has no time")
        except Failure:  # no git, or not a clone
            os.environ["SOURCE_DATE_EPOCH"] = "1000000000"


def build_sdist() -> Path:
    """Build the sdist in an isolated environment."""
    log = new_log("dist-sdist")
    with tempfile.TemporaryDirectory(prefix="nbd-sdist-") as name:
        folder = Path(name, "source")
        shutil.copytree(ROOT, folder, ignore=NOT_IN_SDIST)
        command = [tools("dist") / "python", "-m", "build", "--sdist", "--outdir", DIST, folder]
        must(log, command, "the sdist cannot be built", environ=clean_environment())
    (sdist,) = DIST.glob("*.tar.gz")
    sdist.write_bytes(with_one_time(sdist))
    return sdist


def with_one_time(archive: Path) -> bytes:
    """Rewrite an archive so that it depends only on the contents of its files and on the time."""
    now = int(os.environ["SOURCE_DATE_EPOCH"])
    target = io.BytesIO()
    with (
        tarfile.open(archive) as old,
        gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=now) as packed,
        tarfile.open(fileobj=packed, mode="w") as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = now, 0, 0, "", ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    return target.getvalue()


def build_wheel(sdist: Path, environment: Environment) -> Path:
    """Build a wheel from the sdist, for an interpreter and a mode."""
    log = new_log(f"dist-wheel-{environment.name}")
    before = set(FOR_SYSTEM.glob("*.whl"))
    pip = [environment.python, "-m", "pip", "wheel", "--no-input", "--no-deps"]
    must(
        log,
        [*pip, "--wheel-dir", FOR_SYSTEM, sdist],
        f"no wheel for {environment.name}",
        environ=clean_environment(NBD_CFFI_MODE=environment.mode, **SAME_BYTES),
        cwd=Path("/"),
    )
    (built,) = set(FOR_SYSTEM.glob("*.whl")) - before
    return built
