# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write every_call.h: a table with one call of each function of nbdglue.h, for test_every_call.c.

Usage: python every_call.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from generator.calls import LOCK_FREE  # noqa: E402
from generator.emit_glue_source import UNSIGNED_64  # noqa: E402
from generator.library import find_library  # noqa: E402
from generator.model import Function, Kind, Parameter  # noqa: E402
from generator.read import read  # noqa: E402
from generator.waiting import stoppable  # noqa: E402

#: The arguments for each kind of parameter, and for some integers; other integers are 0.
VALUES = {
    Kind.BOOL: ("true",),
    Kind.STRING: ("a->text",),
    Kind.PATH: ("a->text",),
    Kind.STRINGS: ("a->argv",),
    Kind.DATA: ("a->data", "sizeof a->data"),
    Kind.OUTPUT: ("a->buffer", "sizeof a->buffer"),
    Kind.ADDRESS: ("a->address", "a->address_size"),
}
INTEGERS = {"count": "512", "sock": "-1"}


def arguments(function: Function) -> list[str]:
    """Return the arguments of the call, the handle first."""
    found = ["s"]
    for parameter in function.parameters:
        found += values(function, parameter)
        if parameter is function.filled_later:
            found.append("&a->state")
    return found


def values(function: Function, parameter: Parameter) -> tuple[str, ...]:
    """Return the arguments for a parameter."""
    if parameter.kind is Kind.CLOSURE:
        token = f"give(&a->tokens[{function.closures.index(parameter)}])"
        return (token, "true") if parameter.optional else (token,)
    if parameter.kind is Kind.INT:
        return (INTEGERS.get(parameter.name, "0"),)
    return VALUES[parameter.kind]


def maker(function: Function) -> str:
    """Return a C function that makes the call and returns its result as an integer."""
    call = f"nbdcall_{function.name}({', '.join(arguments(function))})"
    body = f"    return (int64_t){call};"
    if function.returns.endswith("*"):
        body = f"    return {call} != NULL;"
    if function.returns == "char *":
        body = (
            f"    char *text = {call};\n    bool is_made = text != NULL;\n\n"
            "    nbdshim_free(text);\n    return is_made;"
        )
    return (
        f"static int64_t make_{function.name}(struct nbdshim *s, struct arguments *a)\n"
        f"{{\n    (void)a;\n{body}\n}}\n"
    )


def row(function: Function) -> str:
    """Return the row of a function in the table."""
    has_zero = function.returns.endswith("*") or function.returns in UNSIGNED_64
    flags = (has_zero, function.name in LOCK_FREE)
    fields = [
        f'"{function.name}"',
        f"make_{function.name}",
        str(len(function.closures)),
        *(str(flag).lower() for flag in flags),
    ]
    return f"    {{{', '.join(fields)}}},\n"


def main() -> None:
    """Write the table for the libnbd.h that pkg-config names."""
    functions = stoppable(read(find_library().header)).functions
    table = "".join(map(row, functions))
    text = '#include "call.h"\n\n' + "\n".join(map(maker, functions))
    text += f"\nstatic const struct call calls[] = {{\n{table}}};\n"
    Path(sys.argv[1], "every_call.h").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
