# SPDX-License-Identifier: LGPL-2.0-or-later
"""A Debian root with CPython for musl, which Debian lacks, to verify the wheels for musl."""

from __future__ import annotations

import os
from pathlib import Path

from console import locked, must, new_log, say
from roots import derived, entering
from targets import Target

SCRIPT = Path(__file__).resolve().with_suffix(".sh")
BUILD_NEEDS = ("dpkg-dev", "gcc", "libc6-dev", "make", "python3", "python3-pip")


def with_musl(target: Target) -> Path:
    """Return the root; it has /opt/python-ARCHITECTURE, which qemu may have to run."""
    root = derived("trixie", "musl", BUILD_NEEDS)
    with locked(root):
        if not (root / "opt" / f"python-{target.architecture}").is_dir():
            say(f"{root.name}: building CPython for {target.zig}")
            jobs = f"MAKEFLAGS=-j{os.cpu_count()}"
            script = ["bash", "-c", SCRIPT.read_text(), SCRIPT.name]
            build = ["env", jobs, *script, target.architecture, target.debian]
            log = new_log(f"python-{target.zig}")
            must(log, entering(root, build), f"CPython for {target.zig} cannot be built")
    return root
