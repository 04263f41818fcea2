# SPDX-License-Identifier: LGPL-2.0-or-later
"""model -> the cdef: what cffi is told of the shim, from the headers that the shim compiles."""

from __future__ import annotations

from generator.emit_glue_header import upcall_parameters
from generator.model import Closure, Header


def cdef(declarations: str) -> str:
    """The cdef of both modes: nbdshim.h and nbdglue.h after the preprocessor."""
    return declarations.strip() + "\n"


def extern_python(header: Header) -> str:
    """What API mode adds: the Python functions that the shim calls upwards."""
    lines = ["int nbdup_release(const uintptr_t *tokens, size_t count);"]
    lines += [upcall(closure) for closure in header.closures]
    return 'extern "Python" {\n' + "".join(f"    {line}\n" for line in lines) + "}\n"


def upcall(closure: Closure) -> str:
    """The declaration of one of them."""
    parameters = ", ".join(["uintptr_t token", *upcall_parameters(closure)])
    return f"int nbdup_{closure.name}({parameters});"
