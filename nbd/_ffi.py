# SPDX-License-Identifier: LGPL-2.0-or-later
"""The shim, loaded in the cffi mode that this package was built for: `ffi` and `lib`.

Everything above these two names is the same in both modes but for one thing, which is here too:
how the shim is given the Python functions that it calls upwards.

The shim is loaded once for the process.  The package may be imported again, where sys.modules was
emptied, as test runners do.  What the shim refers to must be the same for all imports: the
registry of callbacks, the counter of tokens, and the functions that are called upwards.  They are
in an object that the shim knows (`Process`), and a later import finds it there.
"""

from __future__ import annotations

import _signal
import atexit
import os
import sys
from _thread import get_ident

from nbd._build import LIBNBD, MODE

__all__ = [
    "IS_CPYTHON",
    "LIBNBD",
    "MODE",
    "ffi",
    "install",
    "keep_upcalls",
    "lib",
    "one_for_all_imports",
    "process",
    "upcall",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Class = TypeVar("Class", bound=type)
    Function = TypeVar("Function", bound=Callable[..., object])

#: Whether objects are finalized as soon as they are dropped, and memory does not move.
IS_CPYTHON = sys.implementation.name == "cpython"


def _explain(reason: Exception) -> str:
    if isinstance(reason, ModuleNotFoundError):
        return f"nbd needs cffi: {reason}. Type: pip install cffi"
    return (
        f"nbd was built against libnbd {LIBNBD} and cannot load it here: {reason}. "
        f"Install libnbd {LIBNBD} or newer (Debian: apt install libnbd0; Fedora: dnf install "
        "libnbd), or build nbd against the libnbd that is installed "
        "(pip install --force-reinstall --no-binary libnbd-cffi libnbd-cffi)."
    )


def _is_subinterpreter() -> bool:
    """Whether this is another interpreter than the main one, on CPython.

    libnbd's callbacks would run in the interpreter that was the first to import the package, with
    objects of another.  Who may set signal handlers is the main thread of the main interpreter: to
    ask for that first saves the import of a module, half a millisecond of eight.
    """
    if not IS_CPYTHON:
        return False
    try:
        _signal.signal(-1, _signal.SIG_DFL)
    except ValueError as refused:
        if str(refused) == "signal number out of range":
            return False
    try:
        if sys.version_info >= (3, 13):
            import _interpreters
        else:
            import _xxsubinterpreters as _interpreters
    except ImportError:  # this Python has none
        return False
    is_other: bool = _interpreters.get_current() != _interpreters.get_main()
    return is_other


if _is_subinterpreter():
    raise ImportError(
        "nbd does not work in subinterpreters: libnbd's callbacks would run in another "
        "interpreter. Import it in the main interpreter, or in another process"
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


class Process:
    """What all imports of this package in one process share.

    Attributes:
        registry: What is kept for libnbd, by token (nbd._callbacks).
        next_token: The next token, an int that was never used before.
        pending: What callbacks raised: the thread, the handle (None if unknown), the exception.
        upcalls: The functions that the shim calls upwards, by name; empty until they are installed.
        classes: The classes that programs compare by identity, by name.
        address: What the shim knows this object by; it must live as long as the object is needed.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "classes",
        "next_token",
        "pending",
        "registry",
        "upcalls",
    )

    def __init__(self) -> None:
        self.registry: dict[int, Any] = {}
        # What itertools.count would give, which takes a while to import.
        self.next_token = iter(range(1, sys.maxsize)).__next__
        self.pending: list[tuple[int, Any, BaseException]] = []
        self.upcalls: dict[str, Any] = {}
        self.classes: dict[str, Any] = {}
        self.address = ffi.new_handle(self)


def one_for_all_imports(cls: Class) -> Class:
    """The class of that name of the first import: so that `except nbd.Error` catches every one."""
    first: Class = process.classes.setdefault(cls.__name__, cls)
    return first


def upcall(name: str) -> Callable[[Function], Function]:
    """Make a function callable from the shim, as the member `name` of its upcalls.

    A function that raises all the same (a signal handler may raise at its first bytecode), or whose
    result cffi cannot convert, returns -1 to the shim, and what it raised is kept: failure never
    looks like 0, and nothing is lost.  A completion happens once, and so it is called again then.
    """

    def decorate(function: Function) -> Function:
        if name in process.upcalls:  # of an earlier import, which does for all
            return function
        keep = _keep_of_completion if name == "completion" else _keep_unexpected
        options = {"error": -1, "onerror": keep}
        if MODE == "API":
            ffi.def_extern(name=f"nbdup_{name}", **options)(function)
            process.upcalls[name] = getattr(lib, f"nbdup_{name}")
        else:
            process.upcalls[name] = ffi.callback(_types[name].type, **options)(function)
        return function

    return decorate


def _keep_unexpected(exc_type: object, exception: BaseException, traceback: object) -> None:
    process.pending.append((get_ident(), None, exception))


def _keep_of_completion(exc_type: object, exception: BaseException, traceback: Any) -> int:
    """The same; tells the shim whether the callable was, or may have been, called."""
    _keep_unexpected(exc_type, exception, traceback)
    is_called = traceback is not None and "error_cell" in traceback.tb_frame.f_locals
    return -1 if is_called else int(lib.NBDSHIM_NOT_DONE)


def install() -> None:
    """Tell the shim about the functions that `upcall` has seen."""
    pointers = {name: ffi.cast(_types[name].type, p) for name, p in process.upcalls.items()}
    lib.nbdshim_register(ffi.new("struct nbdshim_upcalls *", pointers))
    if MODE == "API" and process is _own:
        _rehearse(pointers)


def _rehearse(upcalls: dict[str, Any]) -> None:
    """Call each upcall once, for no token.

    At its first call cffi looks for the Python function.  Where the stack is full by then, it does
    not find it, and the shim would take what cffi returns, 0, for success.
    """
    for name, pointer in upcalls.items():
        pointer(*(ffi.cast(argument, 0) for argument in _types[name].type.args))
    process.pending[:] = [one for one in process.pending if not isinstance(one[2], Exception)]


def keep_upcalls() -> None:
    """Keep what libnbd calls upwards until the process is gone, if other threads may be inside it.

    CPython frees everything when it ends, and what ffi.callback has made would be freed before a
    daemon thread that waits in C calls it.  There it finds that Python has ended, and stops.
    """
    if MODE == "ABI" and IS_CPYTHON and len(sys._current_frames()) > 1:
        import ctypes

        for pointer in process.upcalls.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pointer))


_types = dict(ffi.typeof("struct nbdshim_upcalls").fields)
_own = Process()
# What runs at the end keeps this module, and with it the object, when sys.modules is emptied.
atexit.register(keep_upcalls)
process: Process = ffi.from_handle(lib.nbdshim_adopt(_own.address))
