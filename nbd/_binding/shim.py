# SPDX-License-Identifier: LGPL-2.0-or-later
"""The shim, loaded in the cffi mode that the package was built for: `ffi` and `lib`.

The modes differ only in the way in which the shim gets the Python functions that it calls, which is
here too (`upcall`).  All other modules are the same in both modes.

The shim is loaded once in a process, but the package may be imported several times, as some test
runners empty sys.modules.  All imports must share what the shim refers to: the registry of
callbacks, the counter of tokens, and the functions that the shim calls.  They are in one object,
`process`.  The first import makes it and gives it to the shim; later imports get it from the shim.
"""

from __future__ import annotations

import _signal
import atexit
import os
import sys
from _thread import get_ident

try:
    from nbd._binding.build import BUNDLED, LIBNBD, MODE
except ModuleNotFoundError:
    _folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    raise ImportError(
        f"nbd in {_folder} is source code that is not built. Type: pip install {_folder}; then "
        "run Python in another folder, so that it finds the installed package"
    ) from None

__all__ = [
    "BY_HANDLER",
    "IS_CPYTHON",
    "IS_FREE_THREADED",
    "LIBNBD",
    "MODE",
    "as_text",
    "ffi",
    "install",
    "keep_upcalls",
    "lib",
    "one_for_all_imports",
    "process",
    "upcall",
]

#: The origin, in `pending`, of an exception that a signal handler raised.
BY_HANDLER = "by a signal handler"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Class = TypeVar("Class", bound=type)
    Function = TypeVar("Function", bound=Callable[..., object])

#: CPython finalizes an object as soon as it is dropped, and never moves it.  PyPy finalizes objects
#: when it collects garbage, and moves them.
IS_CPYTHON = sys.implementation.name == "cpython"


def _explain(reason: Exception) -> str:
    if isinstance(reason, ModuleNotFoundError):
        return f"nbd needs cffi: {reason}. Type: pip install cffi"
    if BUNDLED:
        return (
            f"nbd cannot load the libnbd {LIBNBD} that came with it: {reason}. Install the wheel "
            "again (pip install --force-reinstall FILE), one that is for this system"
        )
    return (
        f"nbd was built against libnbd {LIBNBD} and cannot load it here: {reason}. "
        f"Install libnbd {LIBNBD} or newer (Debian: apt install libnbd0; Fedora: dnf install "
        "libnbd), or build nbd against the libnbd that is installed "
        "(pip install --force-reinstall --no-binary libnbd-cffi libnbd-cffi)."
    )


def _is_subinterpreter() -> bool:
    """Whether this is a subinterpreter of CPython.

    There, libnbd's callbacks would run in the interpreter that imported the package first, with
    objects of another.  Only the main thread of the main interpreter may set signal handlers.  That
    is tried first, because it saves the import of _interpreters, 0.5 of 6 ms, if it is allowed.
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
    except ImportError:  # this Python has no subinterpreters
        return False
    is_other: bool = _interpreters.get_current() != _interpreters.get_main()
    return is_other


if _is_subinterpreter():
    raise ImportError(
        "nbd does not work in subinterpreters: libnbd's callbacks would run in another "
        "interpreter. Import it in the main interpreter, or in another process"
    )

# RTLD_LAZY, as in a C program: the libraries that libnbd needs have thousands of functions, few of
# which are called.  The shim itself is linked with -z now, so that loading it fails if libnbd lacks
# a function.
try:
    if MODE == "API":
        _others = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        try:
            from nbd._binding.api import ffi, lib
        finally:
            sys.setdlopenflags(_others)
    else:
        from nbd._binding.abi import ffi

        # RTLD_NODELETE: a daemon thread may be inside the shim until the process has ended.
        _path = os.path.join(os.path.dirname(__file__), "nbdshim.so")
        lib = ffi.dlopen(_path, ffi.RTLD_LAZY | ffi.RTLD_NODELETE)
except (ImportError, OSError) as reason:
    raise ImportError(_explain(reason)) from reason


#: Whether threads run Python code at the same time: CPython without the GIL.  Code that the GIL
#: protects asks for this.  A GIL that is enabled here is never disabled later.
IS_FREE_THREADED = hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled()


class Process:
    """What all imports of this package in one process share.

    Attributes:
        registry: The objects that are kept for libnbd, by token (nbd._binding.callbacks).
        next_token: Returns the next token, an int that was never used before.
        pending: The exceptions of callbacks that no call has raised yet (nbd._binding.errors).
        upcalls: The functions that the shim calls, by name; empty until they are installed.
        classes: The classes that programs compare by identity, by name.
        address: The cdata by which the shim knows this object.  It must live as long as the object.
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
        # An iterator of range, as itertools would have to be imported.  It is atomic only under the
        # GIL; without it, two threads would get the same token.  With it, the shim's function would
        # release the GIL for nothing.
        one_by_one = iter(range(1, sys.maxsize)).__next__
        self.next_token = lib.nbdshim_next_token if IS_FREE_THREADED else one_by_one
        self.pending: list[tuple[int, Any, BaseException]] = []
        self.upcalls: dict[str, Any] = {}
        self.classes: dict[str, Any] = {}
        self.address = ffi.new_handle(self)


def one_for_all_imports(cls: Class) -> Class:
    """The first import's class of that name, so that `except nbd.Error` works for all imports."""
    first: Class = process.classes.setdefault(cls.__name__, cls)
    return first


def as_text(pointer: Any) -> str:
    """The string at a char pointer.  Bytes that are not UTF-8 become surrogates (os.fsdecode)."""
    raw: bytes = ffi.string(pointer)
    return raw.decode("utf-8", "surrogateescape")


def upcall(name: str) -> Callable[[Function], Function]:
    """Make a function callable from the shim, as the member `name` of its upcalls.

    The function catches the exceptions of the callable.  Two other kinds of exception can leave it:
    a signal handler may raise at its first bytecode, and cffi may be unable to convert its result.
    Then the shim gets -1, so that a failure never looks like 0, and the exception is kept.  libnbd
    calls a completion only once, so the shim repeats that upcall.
    """

    def decorate(function: Function) -> Function:
        if name in process.upcalls:  # the function of the first import serves all imports
            return function
        keep = _KEEPERS.get(name, _keep_unexpected)
        options = {"error": -1, "onerror": keep}
        if MODE == "API":
            ffi.def_extern(name=f"nbdup_{name}", **options)(function)
            process.upcalls[name] = getattr(lib, f"nbdup_{name}")
        else:
            process.upcalls[name] = ffi.callback(_types[name].type, **options)(function)
        return function

    return decorate


def _keep_unexpected(exc_type: object, exception: BaseException, traceback: Any) -> None:
    # No line of an upcall itself raises out of it.  So if it has called a function there, that is
    # the handler of a signal.
    is_by_handler = traceback is not None and traceback.tb_next is not None
    origin = BY_HANDLER if is_by_handler else None
    process.pending.append((get_ident(), origin, exception.with_traceback(traceback)))


def _keep_of_completion(exc_type: object, exception: BaseException, traceback: Any) -> int:
    """The same for a completion, whose callable may not have been called: the shim tries again."""
    _keep_unexpected(exc_type, exception, traceback)
    return int(lib.NBDSHIM_NOT_DONE)


def _keep_of_handler(exc_type: object, exception: BaseException, traceback: Any) -> None:
    """The same for an exception of a signal handler that ran while a call was waiting."""
    process.pending.append((get_ident(), BY_HANDLER, exception.with_traceback(traceback)))


_KEEPERS = {"completion": _keep_of_completion, "interrupted": _keep_of_handler}


def install() -> None:
    """Register the functions of `upcall` with the shim."""
    lib.nbdshim_register(ffi.new("struct nbdshim_upcalls *", process.upcalls))
    if MODE == "API" and process is _own:
        _rehearse(process.upcalls)


def _rehearse(upcalls: dict[str, Any]) -> None:
    """Call each upcall once, without a valid token.

    At the first call, cffi looks up the Python function.  If the stack is full at that moment, the
    lookup fails, and cffi returns 0, which the shim would take for success.
    """
    for name, pointer in upcalls.items():
        pointer(*(ffi.cast(argument, 0) for argument in _types[name].type.args))
    process.pending[:] = [one for one in process.pending if not isinstance(one[2], Exception)]


def keep_upcalls() -> None:
    """Never free the upcalls of ABI mode, if other threads may be about to call them.

    When CPython ends, it also frees what ffi.callback has made.  A daemon thread that waits in C
    may call an upcall after that.  If the upcall still exists, the thread notices that Python has
    ended, and stops.
    """
    if MODE == "ABI" and IS_CPYTHON and len(sys._current_frames()) > 1:
        import ctypes

        for pointer in process.upcalls.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pointer))


_types = dict(ffi.typeof("struct nbdshim_upcalls").fields)
_own = Process()
# atexit keeps this module alive, and with it the object, when sys.modules is emptied.
atexit.register(keep_upcalls)
process: Process = ffi.from_handle(lib.nbdshim_adopt(_own.address))
