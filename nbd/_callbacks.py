# SPDX-License-Identifier: LGPL-2.0-or-later
"""The way of a callback, from the method it is given to until libnbd is done with it.

A method registers the callable under a token, an int, and gives the token to the shim.  libnbd
calls the shim, the shim calls the function of nbd.closures for that type of callback, and that one
finds the callable by the token, converts the arguments and calls it.  When libnbd has freed the
callback, the shim hands the token over at the end of a call on the handle (`release`), and the
entry goes: so the registry keeps alive just what libnbd still needs, the callable, and the memory
of a command in flight.

A method that is left by an exception, at whatever bytecode a signal handler raises it, asks the
shim which of its tokens it holds, and forgets the others (`abandon`).

A callable that raises cannot raise through C.  libnbd is told -1, and the exception waits in
`pending` until the call that ran the callback comes back to its method in that thread.  There
`settle` raises it if it is one that must not be held up (KeyboardInterrupt, SystemExit), makes it
the cause of the nbd.Error if the call failed, and else gives it to sys.unraisablehook.
"""

from __future__ import annotations

import sys
from _thread import get_ident

from nbd._ffi import IS_CPYTHON, ffi, lib, process
from nbd._values import as_text
from nbd.error import ClosedHandle, Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # The callable (None if only the end of the command matters), the handle, and for a command with
    # a buffer the object that has the caller's bytes and the memory that libnbd uses.
    Entry = tuple[Any, Any, Any, Any]

registry: dict[int, Entry] = process.registry
next_token = process.next_token
pending = process.pending
forget = registry.pop

# The thread in which the process ends, from when its handles are closed.
_ending: int | None = None


class ErrorNumber:
    """The errno of a command, as a callback sees it and may change it.

    Attributes:
        value: The errno; 0 is success, and the object is false then.
    """

    __slots__ = ("value",)

    value: int

    def __bool__(self) -> bool:
        return self.value != 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value})"


def not_callable(name: str, value: object) -> TypeError:
    """The exception for an argument that cannot be called."""
    return TypeError(f"{name}: a callable is needed, not {type(value).__name__}")


def set_errno(address: int, value: int) -> None:
    """Change the errno of a command, which a callback was given."""
    ffi.cast("int *", address)[0] = value


def as_int(result: object) -> int:
    """What libnbd is told of a result: an int, such as True, as it is, anything else as 0."""
    return result if isinstance(result, int) else 0


def abandon(handle: Any, *tokens: int) -> None:
    """Forget those tokens of a call that the shim does not hold: it was not called, or failed."""
    for token in tokens:
        if token and not lib.nbdshim_holds(handle, token):
            forget(token, None)


def keep(raised: BaseException, token: int) -> int:
    """Keep what a callable raised for the method whose call ran it; the -1 for libnbd."""
    entry = registry.get(token)
    pending.append((get_ident(), entry[1] if entry else None, raised))
    return -1


def end_other_threads() -> None:
    """Let calls that fail in other threads than this raise SystemExit: the process ends here.

    Only daemon threads are left then, and it is the end of the process that closed their handles.
    A traceback would be no help, and CPython aborts if one is printed while it ends.
    """
    global _ending
    _ending = get_ident()
    lib.nbdshim_end_other_threads()


def settle(handle: Any, result: Any) -> None:
    """Raise what a method's call left to raise: it failed, or callbacks of it raised."""
    _raise(handle, _or_end(_failure(handle, result, sys._getframe(1).f_code.co_name)))


def explain(handle: Any, raised: BaseException, **numbers: tuple[object, str]) -> None:
    """Raise what says more than an exception that came of an argument, if anything does.

    Args:
        handle: If it is closed, ClosedHandle says so, whatever the arguments are.
        raised: The exception.  cffi's OverflowError knows the value but not the name.
        numbers: The value and the C type of each argument that is a number, by its name.
    """
    if not isinstance(raised, Exception) or isinstance(raised, ClosedHandle):
        return
    if lib.nbdshim_check(handle) == lib.NBDSHIM_CLOSED:
        raise no_handle(handle)
    if not isinstance(raised, OverflowError):
        return
    for name, (value, ctype) in numbers.items():
        try:
            ffi.new(f"{ctype} *", value)
        except OverflowError:
            bits = 8 * ffi.sizeof(ctype)
            signed = int(ffi.cast(ctype, -1)) < 0
            least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            text = f"{name}: {value} is not between {least} and {most}"
            raise OverflowError(text) from None
        except TypeError:  # its own __index__ has raised
            continue


def no_handle(handle: Any) -> Exception:
    """The exception for a call on a handle that is closed, or was never made."""
    if not handle:
        return AttributeError("no handle was made: __init__ must call nbd.NBD.__init__")
    return ClosedHandle("the handle is closed; make a new one with nbd.NBD()")


def _or_end(failure: Exception | None) -> BaseException | None:
    """The failure of a call, or in its place what ends this thread."""
    if failure is None or _ending in (None, get_ident()):
        return failure
    return SystemExit("the program ends, and with it this thread")


def _raise(handle: Any, failure: BaseException | None) -> None:
    """Raise a failure, or what a callback raised that must not be held up; report the rest.

    Of several that must not be held up, the others wait for the next calls.

    What waits in `pending` is taken out when the exception is on its way: a signal handler may
    raise at any bytecode before, and then it still waits for the next call.

    An exception refers to the frames it has passed, so no frame may refer to it in turn: the
    caller's buffer would stay pinned until the next garbage collection.
    """
    waiting = _waiting(handle)
    urgent = [one for one in waiting if not isinstance(one[2], Exception)]
    others = [one for one in waiting if isinstance(one[2], Exception)]
    try:
        if urgent:
            _raise_waiting(urgent[0])
        if failure is not None:
            if others:
                _raise_with_cause(failure, others.pop(0))
            raise failure
    finally:
        _report(others)
        del failure, waiting, urgent, others


def _raise_waiting(one: tuple[int, Any, BaseException]) -> None:
    try:
        raise one[2]
    except BaseException:
        pending.remove(one)
        raise
    finally:
        del one


def _raise_with_cause(failure: BaseException, one: tuple[int, Any, BaseException]) -> None:
    try:
        raise failure from one[2]
    except BaseException:
        pending.remove(one)
        raise
    finally:
        del failure, one


def report_pending(handle: Any) -> None:
    """Give what callbacks raised to sys.unraisablehook: nobody waits for it."""
    _report(_waiting(handle))


def _waiting(handle: Any) -> list[tuple[int, Any, BaseException]]:
    """What callbacks of this handle raised in this thread."""
    # A copy: where another thread takes its own out meanwhile, a loop passes over one.
    return [one for one in list(pending) if one[0] == get_ident() and one[1] in (handle, None)]


def _failure(handle: Any, result: Any, method: str) -> Exception | None:
    """The exception for a result: a negative number or a null pointer; None for a good one."""
    if isinstance(result, int):
        if result >= 0:
            return None
        code = result
    else:
        if result:
            return None
        code = lib.nbdshim_check(handle) or -1
    if code == -1:
        return last_error()
    if code == lib.NBDSHIM_CLOSED:
        return no_handle(handle)
    if code == lib.NBDSHIM_NO_MEMORY:
        return MemoryError(f"nbd_{method}: no memory for a callback")
    import errno

    if code == lib.NBDSHIM_REENTERED:
        return Error(
            f"nbd_{method}: called from inside a callback of the same handle, where libnbd would "
            "deadlock; make the call after the callback has returned",
            errno.EDEADLK,
        )
    return Error(f"nbd_{method}: the server's number is too large", errno.EOVERFLOW)


def last_error() -> Error:
    """This thread's last libnbd error."""
    message = lib.nbdshim_error()
    failure = Error(as_text(message) if message else "unknown error", lib.nbdshim_errno())
    if not IS_CPYTHON and failure.errno == "EMFILE":  # PyPy closes late what was dropped
        import gc

        gc.collect()
    return failure


def _report(waiting: list[tuple[int, Any, BaseException]]) -> None:
    """Hand exceptions to sys.unraisablehook, as the interpreter does for a destructor's.

    In no destructor, for there the exception of a signal handler would be lost.
    """
    while waiting:
        one = waiting.pop(0)
        pending.remove(one)
        try:
            sys.unraisablehook(_unraisable(one[2]))
        except Exception as broken:
            sys.__unraisablehook__(_unraisable(broken))


def _unraisable(exception: BaseException) -> Any:
    """What sys.unraisablehook is called with."""
    fields = {
        "exc_type": type(exception),
        "exc_value": exception,
        "exc_traceback": exception.__traceback__,
        "err_msg": "Exception ignored in a callback of libnbd",
        "object": None,
    }
    if IS_CPYTHON:  # its own hook takes no other type than this one, which has no public name
        made: Any = next(c for c in tuple.__subclasses__() if c.__name__ == "UnraisableHookArgs")
        return made(fields.values())
    from types import SimpleNamespace

    return SimpleNamespace(**fields, extra_line="")
