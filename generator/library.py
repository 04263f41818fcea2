# SPDX-License-Identifier: LGPL-2.0-or-later
"""Finding: where libnbd is, and the tools that the build runs."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

INSTALL = "Debian: apt install {debian}; Fedora: dnf install {fedora}"


class BuildError(Exception):
    """The build cannot go on; the message says what is missing and how to get it."""


class Library(NamedTuple):
    """Where libnbd is, as pkg-config says."""

    header: Path
    version: str
    cflags: tuple[str, ...]
    libs: tuple[str, ...]


def run_tool(command: Sequence[str], missing: str) -> str:
    """The output of a build tool; BuildError with `missing` if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} was not found. {missing}") from None
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed: {done.stderr.strip()}\n{missing}")
    return done.stdout


def find_library(environ: Mapping[str, str] = os.environ) -> Library:
    """Ask pkg-config for libnbd.

    Raises:
        BuildError: pkg-config, libnbd.pc or libnbd.h is missing.
    """
    tool = environ.get("PKG_CONFIG", "pkg-config")
    install_tool = INSTALL.format(debian="pkg-config", fedora="pkgconf-pkg-config")
    install_libnbd = INSTALL.format(debian="libnbd-dev", fedora="libnbd-devel")
    run_tool([tool, "--version"], f"It is needed to find libnbd. {install_tool}")

    def ask(*what: str) -> str:
        return run_tool(
            [tool, *what, "libnbd"], f"libnbd's header is needed. {install_libnbd}"
        ).strip()

    header = Path(ask("--variable=includedir") or "/usr/include") / "libnbd.h"
    if not header.is_file():
        raise BuildError(f"{header} is missing although libnbd.pc is there. {install_libnbd}")
    return Library(
        header,
        ask("--modversion"),
        tuple(shlex.split(ask("--cflags"))),
        tuple(shlex.split(ask("--libs"))),
    )
