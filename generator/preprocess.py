# SPDX-License-Identifier: LGPL-2.0-or-later
"""Preprocessing: a header as the C preprocessor gives it back, with its macros."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from generator.library import INSTALL, run_tool

#: Headers that libnbd.h includes.  Empty stand-ins are enough: only their types' names matter.
SYSTEM_HEADERS = ("stdbool.h", "stddef.h", "stdint.h", "sys/socket.h", "sys/types.h")

TYPES = [
    "bool",
    "int8_t",
    "uint8_t",
    "int16_t",
    "uint16_t",
    "int32_t",
    "uint32_t",
    "int64_t",
    "uint64_t",
    "intptr_t",
    "uintptr_t",
    "size_t",
    "ssize_t",
    "socklen_t",
]

PRELUDE = "".join(f"typedef int {name};\n" for name in TYPES)


def preprocess(header: Path, *options: str, compiler: str | None = None) -> str:
    """What the C preprocessor makes of a header, the system's own headers left out."""
    command = shlex.split(compiler or os.environ.get("CC") or "cc")
    missing = "A C compiler is needed. " + INSTALL.format(debian="gcc libc6-dev", fedora="gcc")
    with tempfile.TemporaryDirectory() as stand_ins:
        for name in SYSTEM_HEADERS:
            path = Path(stand_ins, name)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        fixed = ["-E", "-P", "-nostdinc", f"-I{stand_ins}", "-D__attribute__(x)="]
        return run_tool([*command, *fixed, *options, str(header)], missing)


def object_macros(macros: str) -> Iterator[tuple[str, str]]:
    """Macros without parameters, in the order of definition, with their text."""
    for line in macros.splitlines():
        directive, _, definition = line.partition(" ")
        name, _, text = definition.partition(" ")
        if directive == "#define" and "(" not in name:
            yield name, text
