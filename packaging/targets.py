# SPDX-License-Identifier: LGPL-2.0-or-later
"""The systems that self-contained wheels are for, and zig as the compiler for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from console import output
from environments import tools

DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


class Target(NamedTuple):
    """A kind of system, and which libnbd its wheel has."""

    architecture: str  # as uname -m says it
    libc: str  # the oldest that the wheel works with, as zig writes it
    tag: str  # what the wheel's tag says of that
    suite: str  # Debian's, whose libnbd it is
    from_source: bool  # built from Debian's sources, else from Debian's packages

    @property
    def platform(self) -> str:
        """The tag for pip."""
        return f"{self.tag}_{self.architecture}"

    @property
    def is_musl(self) -> bool:
        """Whether it has musl in place of glibc."""
        return self.libc == "musl"

    @property
    def zig(self) -> str:
        """The target in zig's words."""
        return f"{self.architecture}-linux-{self.libc}"

    @property
    def debian(self) -> str:
        """The architecture in Debian's words."""
        return DEBIAN_NAMES[self.architecture]


CURRENT = [Target(a, "gnu.2.38", "manylinux_2_38", "forky", False) for a in DEBIAN_NAMES]
OLDER = [Target(a, "gnu.2.17", "manylinux_2_17", "trixie", True) for a in DEBIAN_NAMES]
MUSL = [Target("x86_64", "musl", "musllinux_1_2", "trixie", True)]
TARGETS = (*CURRENT, *OLDER, *MUSL)


class Part(NamedTuple):
    """A package of Debian's, or a source package, that a wheel has libraries of."""

    name: str
    version: str
    purl: str
    libraries: frozenset[str]  # file names up to ".so"
    copyright: Path


class Libraries(NamedTuple):
    """libnbd and what it needs, for a target."""

    pkgconfig: Path  # the folder of libnbd.pc
    folders: list[Path]  # where the shared libraries are
    parts: list[Part]
    common_licences: Path  # the texts that copyright files refer to


def zig() -> Path:
    """The program zig."""
    python = tools("dist") / "python"
    where = [python, "-c", "import ziglang; print(ziglang.__path__[0])"]
    return Path(output(where, "zig is missing"), "zig")
