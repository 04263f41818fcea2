# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write nbdglue.h, which declares the functions that Python calls, and those that call Python.

The former are the flat functions: they take and return only integers and pointers, no structs.
Each call of libnbd has one.  The latter are the upcalls.
"""

from __future__ import annotations

from collections.abc import Iterator

from generator.model import CallbackKind, Closure, Function, Header, Kind
from generator.text import banner_c, wrap_c

BANNER = banner_c(__name__)

#: The upcalls that do not belong to a callback type, and their parameters.
SHIM_UPCALLS = {
    "release": "const uintptr_t *tokens, size_t count",
    "interrupted": "void",
    "orphaned": "uintptr_t token",
}


def glue_header(header: Header) -> str:
    """The text of nbdglue.h, from which the cdef is made as well."""
    blocks = [
        f'{BANNER}#ifndef NBDGLUE_H\n#define NBDGLUE_H\n\n#include "queue.h"\n',
        upcalls_struct(header),
        *(f"{wrap_c(prototype(function) + ';')}\n" for function in header.functions),
        "#endif\n",
    ]
    return "\n".join(blocks)


def upcalls_struct(header: Header) -> str:
    """The struct of all upcalls: those of the shim, and one for each callback type."""
    lines = ["struct nbdshim_upcalls {"]
    lines += [f"    int (*{name})({parameters});" for name, parameters in SHIM_UPCALLS.items()]
    for closure in header.closures:
        arguments = ", ".join(["uintptr_t token", *upcall_parameters(closure)])
        lines.append(wrap_c(f"    int (*{closure.name})({arguments});"))
    return "\n".join([*lines, "};\n"])


def upcall_parameters(closure: Closure) -> Iterator[str]:
    """The parameters of an upcall, without the first one, the token."""
    for argument in closure.arguments:
        if argument.kind is CallbackKind.INTS:
            yield f"const {argument.ctype} *{argument.name}"
        elif argument.kind is CallbackKind.PAIRS:
            yield f"const uint64_t *{argument.name}"
        elif argument.kind is CallbackKind.VIEW:
            yield f"size_t {argument.name}_at"
        elif argument.kind is CallbackKind.ERROR:
            yield f"int {argument.name}"
            yield f"uintptr_t {argument.name}_at"
        else:
            yield declare(argument.ctype, argument.name)
        if argument.length:
            yield f"size_t {argument.length}"


def declare(ctype: str, name: str) -> str:
    """`int *` and `p` -> `int *p`."""
    return f"{ctype}{name}" if ctype.endswith("*") else f"{ctype} {name}"


def returned_type(function: Function) -> str:
    """The return type of the flat function.

    When the shim refuses a call, it returns a negative number if the type is an integer.  So an
    unsigned 32-bit type becomes int64_t, and bool becomes int.  Larger unsigned types are kept; see
    emit_glue_source.refused_value.
    """
    if function.returns in ("uint32_t", "unsigned", "unsigned int"):
        return "int64_t"
    return "int" if function.returns == "bool" else function.returns


def flat_parameters(function: Function) -> Iterator[str]:
    """The parameters of the flat function, without the first one, the handle."""
    for parameter in function.parameters:
        if parameter.kind is Kind.CLOSURE:
            yield f"uintptr_t {parameter.name}"
            if parameter.optional:
                yield f"bool has_{parameter.name}"
        elif parameter.kind is Kind.ADDRESS:
            yield f"const void *{parameter.name}"
            yield f"uint32_t {parameter.length}"
        else:
            yield declare(parameter.ctype, parameter.name)
            if parameter.length:
                yield f"size_t {parameter.length}"
            if parameter is function.filled_later:
                yield f"int *{parameter.name}_state"


def prototype(function: Function) -> str:
    """The flat function's declaration, without a semicolon."""
    parameters = ", ".join(["struct nbdshim *s", *flat_parameters(function)])
    return declare(returned_type(function), f"nbdcall_{function.name}({parameters})")
