# SPDX-License-Identifier: LGPL-2.0-or-later
"""Find libnbd with pkg-config, and run the tools that the build needs."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

#: How to install a missing package: the end of most messages of BuildError.
INSTALL = "Debian: apt install {debian}; Fedora: dnf install {fedora}"


class BuildError(Exception):
    """The build cannot continue; the message says what is missing and how to install it."""


class Library(NamedTuple):
    """The header, the version and the compiler options of libnbd, as pkg-config reports them."""

    header: Path
    version: str
    cflags: tuple[str, ...]
    libs: tuple[str, ...]


def run_tool(command: Sequence[str], missing: str) -> str:
    """Run a build tool and return its output.

    Raises:
        BuildError: The tool is not installed, or it fails.  The message ends with `missing`.
    """
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
