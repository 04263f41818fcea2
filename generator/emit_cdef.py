# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write the cdef: the C declarations from which cffi knows the functions of the shim.

They come from the same headers with which the shim is compiled, so that the two cannot differ.
"""

from __future__ import annotations

from generator.emit_glue_header import SHIM_UPCALLS, upcall_parameters
from generator.model import Closure, Header


def cdef(declarations: str) -> str:
    """The cdef of both modes.  `declarations` is nbdglue.h after the preprocessor."""
    return declarations.strip() + "\n"


def extern_python(header: Header) -> str:
    """What API mode adds to the cdef: the Python functions that the shim calls."""
    lines = [f"int nbdup_{name}({parameters});" for name, parameters in SHIM_UPCALLS.items()]
    lines += [upcall(closure) for closure in header.closures]
    return 'extern "Python" {\n' + "".join(f"    {line}\n" for line in lines) + "}\n"


def upcall(closure: Closure) -> str:
    """The declaration of the Python function for one callback type."""
    parameters = ", ".join(["uintptr_t token", *upcall_parameters(closure)])
    return f"int nbdup_{closure.name}({parameters});"
