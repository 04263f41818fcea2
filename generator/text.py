# SPDX-License-Identifier: LGPL-2.0-or-later
"""Functions for all emitters: the banner of a generated file, and breaking long lines."""

from __future__ import annotations

from collections.abc import Sequence

#: The longest line that is generated, as in pyproject.toml and .clang-format.
COLUMNS = 100


def banner(module: str) -> str:
    """The first lines of a generated Python module; `module` is the __name__ of the emitter."""
    return (
        "# SPDX-License-Identifier: LGPL-2.0-or-later\n"
        f"# Made from libnbd.h by {source_path(module)}: change that, not this.\n"
    )


def banner_c(module: str) -> str:
    """The same for a generated C file."""
    return (
        "// SPDX-License-Identifier: LGPL-2.0-or-later\n"
        f"/* Made from libnbd.h by {source_path(module)}: change that, not this. */\n"
    )


def source_path(module: str) -> str:
    """`generator.text` -> `generator/text.py`."""
    return module.replace(".", "/") + ".py"


def wrap(text: str, indent: int) -> str:
    """A Python call or signature.  If it is too long for one line, each argument has its own line.

    `indent` is the number of columns by which the caller indents the result.
    """
    if len(text) + indent <= COLUMNS:
        return text
    opened = text.index("(")
    closed = text.rindex(")")
    arguments = split_arguments(text[opened + 1 : closed])
    inner = "".join(f"    {argument},\n" for argument in arguments)
    return f"{text[: opened + 1]}\n{inner}{text[closed:]}"


def split_arguments(text: str) -> list[str]:
    """Split a list of arguments at its commas, except those inside brackets."""
    found = [""]
    depth = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [argument.strip() for argument in found]


def wrap_c(text: str) -> str:
    """A C declaration or call, broken after commas if it is too long for one line.

    As with clang-format, a line is aligned with the first character in the open parenthesis.
    """
    lines: list[str] = []
    while len(text) > COLUMNS:
        cut = text.rfind(", ", 0, COLUMNS + 1) + 1
        lines.append(text[:cut])
        text = " " * (open_parenthesis(lines) + 1) + text[cut + 1 :]
    return "\n".join([*lines, text])


def open_parenthesis(lines: Sequence[str]) -> int:
    """The column of the innermost parenthesis that is still open after the last line."""
    columns: list[int] = []
    for line in lines:
        for column, character in enumerate(line):
            if character == "(":
                columns.append(column)
            elif character == ")":
                columns.pop()
    return columns[-1]
