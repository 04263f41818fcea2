# SPDX-License-Identifier: LGPL-2.0-or-later
"""The shim, loaded in the cffi mode that this package was built for: `ffi` and `lib`.

Everything above these two names is the same in both modes but for one thing, which is here too:
how the shim is given the Python functions that it calls upwards.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident

from nbd._build import LIBNBD, MODE

__all__ = ["LIBNBD", "MODE", "ffi", "install", "keep_upcalls", "lib", "pending", "upcall"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Function = TypeVar("Function", bound=Callable[..., object])


def _explain(reason: Exception) -> str:
    if isinstance(reason, ModuleNotFoundError):
        return f"nbd needs cffi: {reason}. Type: pip install cffi"
    return (
        f"nbd was built against libnbd {LIBNBD} and cannot load it here: {reason}. "
        f"Install libnbd {LIBNBD} or newer (Debian: apt install libnbd0; Fedora: dnf install "
        "libnbd), or build nbd against the libnbd that is installed "
        "(pip install --force-reinstall --no-binary libnbd-cffi libnbd-cffi)."
    )


# Lazily, as a C program links: of the thousands of functions of what libnbd stands on, few are ever
# called.  The shim itself is linked with -z now, so that one that libnbd lacks is an error here.
try:
    if MODE == "API":
        _others = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        try:
            from nbd._api import ffi, lib
        finally:
            sys.setdlopenflags(_others)
    else:
        from nbd._abi import ffi

        # Not to be unloaded: a daemon thread may be inside of it to the very end of the process.
        _lasting = ffi.RTLD_LAZY | ffi.RTLD_NODELETE
        lib = ffi.dlopen(os.path.join(os.path.dirname(__file__), "_nbdshim.so"), _lasting)
except (ImportError, OSError) as reason:
    raise ImportError(_explain(reason)) from reason

#: What callbacks raised: the thread, the handle (None if unknown) and the exception.
pending: list[tuple[int, Any, BaseException]] = []

_pointers: dict[str, Any] = {}
_types = dict(ffi.typeof("struct nbdshim_upcalls").fields)


def upcall(name: str) -> Callable[[Function], Function]:
    """Make a function callable from the shim, as the member `name` of its upcalls.

    Such a function handles its own exceptions; where cffi cannot convert what it returns, such as
    an int too large for C, the shim sees -1: failure never looks like 0.
    """

    def decorate(function: Function) -> Function:
        options = {} if name == "release" else {"error": -1, "onerror": _unconverted}
        if MODE == "API":
            ffi.def_extern(name=f"nbdup_{name}", **options)(function)
            _pointers[name] = getattr(lib, f"nbdup_{name}")
        else:
            _pointers[name] = ffi.callback(_types[name].type, **options)(function)
        return function

    return decorate


def _unconverted(exc_type: object, exception: BaseException, traceback: object) -> None:
    pending.append((get_ident(), None, exception))


def install() -> None:
    """Tell the shim about every function that `upcall` has seen, once for the process."""
    lib.nbdshim_register(ffi.new("struct nbdshim_upcalls *", _pointers))


def keep_upcalls() -> None:
    """Keep what libnbd calls upwards until the process is gone, if other threads may be inside it.

    CPython frees everything when it ends, and what ffi.callback has made would be freed before a
    daemon thread that waits in C calls it.  There it finds that Python has ended, and stops.
    """
    is_freed = MODE == "ABI" and sys.implementation.name == "cpython"
    if is_freed and len(sys._current_frames()) > 1:
        import ctypes

        for pointer in _pointers.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pointer))
