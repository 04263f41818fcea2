# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write the cdef: the C declarations that tell cffi the functions of the shim.

They come from the headers with which the shim is compiled, so the two cannot differ.
"""

from __future__ import annotations

from generator.emit_glue_header import SHIM_UPCALLS, upcall_parameters
from generator.model import Closure, Header


def cdef(declarations: str) -> str:
    """The cdef of both modes.  `declarations` is the preprocessed text of nbdglue.h."""
    return declarations.strip() + "\n"


def extern_python(header: Header) -> str:
    """The addition of API mode to the cdef: the Python functions that the shim calls."""
    lines = [f"int nbdup_{name}({parameters});" for name, parameters in SHIM_UPCALLS.items()]
    lines += [upcall(closure) for closure in header.closures]
    return 'extern "Python" {\n' + "".join(f"    {line}\n" for line in lines) + "}\n"


def upcall(closure: Closure) -> str:
    """The declaration of the Python function for one callback type."""
    parameters = ", ".join(["uintptr_t token", *upcall_parameters(closure)])
    return f"int nbdup_{closure.name}({parameters});"
