# SPDX-License-Identifier: LGPL-2.0-or-later
"""The systems that bundled wheels are built for; zig is the compiler for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from console import output
from environments import tools

DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


class Target(NamedTuple):
    """A kind of system, and the libnbd of its wheel."""

    architecture: str  # as printed by uname -m
    libc: str  # the oldest libc that the wheel works with, as zig writes it
    tag: str  # the same in the wheel's platform tag
    suite: str  # the Debian release that libnbd is from
    from_source: bool  # built from Debian's sources, not taken from its packages

    @property
    def platform(self) -> str:
        """The platform tag of the wheel."""
        return f"{self.tag}_{self.architecture}"

    @property
    def is_musl(self) -> bool:
        """Whether the libc is musl and not glibc."""
        return self.libc == "musl"

    @property
    def zig(self) -> str:
        """The target as zig writes it."""
        return f"{self.architecture}-linux-{self.libc}"

    @property
    def debian(self) -> str:
        """The architecture as Debian writes it."""
        return DEBIAN_NAMES[self.architecture]


CURRENT = [Target(a, "gnu.2.38", "manylinux_2_38", "forky", False) for a in DEBIAN_NAMES]
OLDER = [Target(a, "gnu.2.17", "manylinux_2_17", "trixie", True) for a in DEBIAN_NAMES]
MUSL = [Target(a, "musl", "musllinux_1_2", "trixie", True) for a in DEBIAN_NAMES]
TARGETS = (*CURRENT, *OLDER, *MUSL)


class Part(NamedTuple):
    """A Debian binary or source package that provides libraries of a wheel."""

    name: str
    version: str
    purl: str
    libraries: frozenset[str]  # file names up to ".so"
    copyright: Path


class Libraries(NamedTuple):
    """libnbd and its dependencies, for a target."""

    pkgconfig: Path  # the folder of libnbd.pc
    folders: list[Path]  # those of the shared libraries
    parts: list[Part]
    common_licences: Path  # the texts that copyright files refer to


def zig() -> Path:
    """The path of zig."""
    python = tools("dist") / "python"
    where = [python, "-c", "import ziglang; print(ziglang.__path__[0])"]
    return Path(output(where, "zig is missing"), "zig")
