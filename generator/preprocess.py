# SPDX-License-Identifier: LGPL-2.0-or-later
"""Run the C preprocessor on a header, and list the macros that it defines."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from generator.library import INSTALL, run_tool

#: The system headers that libnbd.h includes.  Empty files replace them, because pycparser does not
#: understand the compiler extensions in the real ones.
SYSTEM_HEADERS = ("stdbool.h", "stddef.h", "stdint.h", "sys/socket.h", "sys/types.h")

#: The types of those headers that libnbd.h uses.
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

#: Declares these types, because pycparser must know which names are types.  Declaring them all as
#: int does no harm: the model only keeps the names.
PRELUDE = "".join(f"typedef int {name};\n" for name in TYPES)


def preprocess(header: Path, *options: str, compiler: str | None = None) -> str:
    """The text of a header after the C preprocessor, without the system headers."""
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
    """The name and the text of each macro without parameters, from the output of `cc -E -dM`."""
    for line in macros.splitlines():
        directive, _, definition = line.partition(" ")
        name, _, text = definition.partition(" ")
        if directive == "#define" and "(" not in name:
            yield name, text
