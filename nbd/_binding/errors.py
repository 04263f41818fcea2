# SPDX-License-Identifier: LGPL-2.0-or-later
"""Errors: the exceptions of the package, and which one a call raises.

A call fails when libnbd reports an error, or when the shim refuses it.  Callbacks that ran during
the call may also have raised.  Their exceptions cannot pass through C: they wait in `pending` until
the call has returned to its method, in the same thread.  Then `raise_pending` handles them:

    KeyboardInterrupt, SystemExit       raised by the method
    another one, if the call failed     the cause of the nbd.Error
    another one, if it succeeded        passed to sys.unraisablehook

An exception of a signal handler, which ran while the call was waiting or during a callback, waits
in `pending` as well.  It is always raised.
"""

from __future__ import annotations

import _signal
import gc
import os
import sys
from _thread import get_ident
from errno import EDEADLK, EINTR, EMFILE, EOVERFLOW, ETIMEDOUT, errorcode

from nbd._binding.shim import (
    BY_HANDLER,
    IS_CPYTHON,
    as_text,
    ffi,
    lib,
    one_for_all_imports,
    process,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # The thread in which a callback raised, the handle, and the exception.  The handle is None if
    # it is not known, and BY_HANDLER for an exception of a signal handler.
    Waiting = tuple[int, Any, BaseException]

#: The flag of a code object whose function takes any number of arguments (inspect.CO_VARARGS).
_HAS_REST = 4
#: The modules whose functions a method's traceback does not show.
_HELPERS = frozenset(f"nbd._binding.{name}" for name in ("buffer", "convert", "errors", "memory"))
#: The instruction with which CPython begins a function since 3.11; 0 elsewhere.
_RESUME = (lambda: 0).__code__.co_code[0] if IS_CPYTHON and sys.version_info >= (3, 11) else 0

pending = process.pending

# The thread that ends the process, from the moment when it begins to close all handles.
_ending: int | None = None


@one_for_all_imports
class Error(Exception):
    """A libnbd call failed.

    Attributes:
        string: What went wrong, for people to read.
        errnum: The errno, such as 107; 0 if the failure has none.
        errno: The errno's name, such as "ENOTCONN"; None if the failure has none.

    Example:
        >>> try:
        ...     nbd.NBD().pread(512, 0)
        ... except nbd.Error as error:
        ...     print(error.errno)
        ENOTCONN

    C: nbd_get_error, nbd_get_errno, since libnbd 1.0.
    """

    __module__ = "nbd"

    @property
    def string(self) -> str:
        """What went wrong, for people to read."""
        message: str = self.args[0] if self.args else ""
        return message

    @property
    def errnum(self) -> int:
        """The errno, or 0 if the failure has none."""
        number: int = self.args[1] if len(self.args) > 1 else 0
        return number

    @property
    def errno(self) -> str | None:
        """The errno's name, or None if the failure has none."""
        return errorcode.get(self.errnum)

    def __str__(self) -> str:
        return f"{self.string} ({self.errno})" if self.errno else f"{self.string}"


@one_for_all_imports
class Timeout(Error, TimeoutError):  # type: ignore[misc] # its errno is that of nbd.Error
    """A call did not finish within the timeout of nbd.NBD.settimeout.

    Its errno is "ETIMEDOUT".  What the call asked for may still happen, because NBD cannot cancel a
    command.  See nbd.NBD.settimeout.

    Example:
        >>> h.settimeout(0.01)
        >>> try:
        ...     h.poll(-1)  # nothing is in flight
        ... except TimeoutError as late:
        ...     print(late.errno)
        ETIMEDOUT
    """

    __module__ = "nbd"

    @property
    def strerror(self) -> str:  # type: ignore[override] # OSError has it as a variable
        """What its errno means."""
        return os.strerror(self.errnum)


@one_for_all_imports
class DiskError(Error, OSError):
    """A read or write of a file of nbd.open failed.

    It is an nbd.Error, and also an OSError, for programs that only know files: its errno is a
    number, the same as its errnum.

    Example:
        >>> isinstance(nbd.DiskError("writing failed", 28), OSError)
        True
    """

    __module__ = "nbd"

    @property
    def errno(self) -> int:  # type: ignore[override] # that of OSError, as programs expect
        """The errno."""
        return self.errnum

    @property
    def strerror(self) -> str:  # type: ignore[override] # OSError has it as a variable
        """What its errno means."""
        return os.strerror(self.errnum)

    def __str__(self) -> str:
        name = errorcode.get(self.errnum)
        return f"{self.string} ({name})" if name else self.string


@one_for_all_imports
class ClosedHandle(ValueError):
    """A method was called on a closed handle.

    Every method raises it after nbd.NBD.close, also a second close.  Make a new handle with
    nbd.NBD().
    """

    __module__ = "nbd"


class UnknownHost(Exception):
    """The host of an address cannot be found; `explained` replaces this by an nbd.Error."""


def failure_of(handle: Any, result: Any, method: str) -> BaseException:
    """The exception for a call that failed; the caller raises it.

    It is returned, not raised, so that the traceback of a failed call ends with the method.  But if
    a callback or a signal handler raised during the call, `raise_pending` raises it here.

    Args:
        handle: The shim's handle.
        result: What the shim returned: a negative number or a null pointer.
        method: The method that the user called, for the message.
    """
    failed = _or_end(_failure(handle, result, method))
    try:
        if pending:
            raise_pending(handle, failed)
        return failed
    finally:
        del failed  # else the exception and this frame could be a cycle: see raise_pending


def explained(handle: Any, raised: BaseException, **numbers: tuple[object, str]) -> BaseException:
    """The exception that a method raises for one that it caught: the same, or a better one.

    Its traceback does not show the functions of the package that converted an argument or made the
    exception.  It does show what they called: code of the user, or the handler of a signal.

    Args:
        handle: If it is closed, the exception is ClosedHandle, whatever the arguments are.
        raised: The caught exception.  An OverflowError of cffi names the value, not the argument.
        numbers: The value and the C type of each argument that is a number, by its name.
    """
    better = _better(handle, raised, numbers)
    if better is None:
        return raised.with_traceback(_below_helpers(raised.__traceback__))
    better.__suppress_context__ = True
    return better


def _better(
    handle: Any, raised: BaseException, numbers: dict[str, tuple[object, str]]
) -> Exception | None:
    """The exception to raise instead of one that an argument caused, if there is a better one."""
    if not isinstance(raised, Exception) or isinstance(raised, (ClosedHandle, Error)):
        return None
    if lib.nbdshim_check(handle) == lib.NBDSHIM_CLOSED:
        return no_handle(handle)
    if isinstance(raised, UnknownHost):
        return Error(str(raised), 0)
    return _out_of_range(numbers) if isinstance(raised, OverflowError) else None


def _out_of_range(numbers: dict[str, tuple[object, str]]) -> OverflowError | None:
    """The exception for the first number that its C type cannot hold."""
    for name, (value, ctype) in numbers.items():
        try:
            ffi.new(f"{ctype} *", value)
        except OverflowError:
            bits = 8 * ffi.sizeof(ctype)
            signed = int(ffi.cast(ctype, -1)) < 0
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            return OverflowError(f"{name}: {value} is not between {low} and {high}")
        except TypeError:  # the value's own __index__ has raised
            continue
    return None


def _below_helpers(traceback: Any) -> Any:
    """The part of a method's traceback below the method and its helpers."""
    traceback = traceback.tb_next
    while (
        traceback is not None
        and traceback.tb_frame.f_globals.get("__name__") in _HELPERS
        and not _has_just_begun(traceback)  # is_by_handler looks for that
    ):
        traceback = traceback.tb_next
    return traceback


def no_handle(handle: Any) -> Exception:
    """The exception for a call on a handle that is closed, or that __init__ did not make."""
    if not handle:
        return AttributeError("no handle was made: __init__ must call nbd.NBD.__init__")
    return ClosedHandle("the handle is closed; make a new one with nbd.NBD()")


def last_error(method: str) -> Error:
    """This thread's last error of libnbd, under the name of the method.

    libnbd names the function that failed.  For a call that waits, this is nbd_aio_X or another one.
    """
    message = lib.nbdshim_error()
    text = as_text(message) if message else "unknown error"
    name, colon, reason = text.partition(":")
    if colon and name.startswith("nbd_"):
        text = f"nbd_{method}:{reason}"
    errnum = lib.nbdshim_errno()
    if not IS_CPYTHON and errnum == EMFILE:
        gc.collect()  # closes the handles that were dropped, so that a second try may succeed
    return Error(text, errnum)


def report_pending(handle: Any) -> None:
    """Pass the exceptions of callbacks to sys.unraisablehook, as no call will raise them.

    An exception of a signal handler is raised by the next call in this thread, on any handle.
    """
    waiting = _waiting(handle, None)
    for one in waiting:
        if is_by_handler(one[2].__traceback__):
            pending.append((one[0], BY_HANDLER, one[2]))
            _take(one)
    _report([one for one in waiting if one in pending])


def end_other_threads() -> None:
    """From now on, calls that fail in other threads raise SystemExit: this thread ends the process.

    The other threads are daemons, and their calls fail because this thread closes the handles.
    Their tracebacks would help nobody, and CPython aborts if one is printed while it shuts down.
    """
    global _ending
    _ending = get_ident()
    lib.nbdshim_end_other_threads()


def _or_end(failed: Exception) -> BaseException:
    """The exception of a failed call, or SystemExit if another thread ends the process."""
    if _ending in (None, get_ident()):
        return failed
    return SystemExit("the program ends, and this thread with it")


def _failure(handle: Any, result: Any, method: str) -> Exception:
    """The exception for a negative number or a null pointer."""
    code = result if isinstance(result, int) else lib.nbdshim_check(handle) or -1
    if code == -1:
        return last_error(method)
    if code == lib.NBDSHIM_CLOSED:
        return no_handle(handle)
    if code == lib.NBDSHIM_NO_MEMORY:
        return MemoryError(f"nbd_{method}: no memory for the call")
    if code == lib.NBDSHIM_TIMED_OUT:
        return Timeout(_late(handle, method), ETIMEDOUT)
    if code == lib.NBDSHIM_STOPPED:
        return Error(f"nbd_{method}: stopped by a signal handler", EINTR)
    if code == lib.NBDSHIM_SERVER_CLOSED:
        return Error(f"nbd_{method}: connection is closed", 0)
    if code <= lib.NBDSHIM_OPTION_FAILED:
        return _refused_option(method, lib.NBDSHIM_OPTION_FAILED - code)
    if code == lib.NBDSHIM_REENTERED:
        return Error(
            f"nbd_{method}: called from inside a callback of the same handle, where libnbd would "
            "deadlock; make the call after the callback has returned",
            EDEADLK,
        )
    return Error(f"nbd_{method}: the server's number is too large", EOVERFLOW)


def _late(handle: Any, method: str) -> str:
    """The message of nbd.Timeout."""
    seconds = lib.nbdshim_timeout(handle)
    return (
        f"nbd_{method}: the server has not answered within {seconds:g} seconds; "
        "try again, allow more time with settimeout, or close the handle"
    )


def _refused_option(method: str, errnum: int) -> Error:
    """The exception for an option that the server refused."""
    asked = method
    if "meta_context" in method:
        is_old = not hasattr(lib, "nbdcall_opt_set_meta_context")
        asked = "list meta context" if is_old else "meta context"
    elif method == "opt_list":
        asked = "list"
    reason = os.strerror(errnum)
    return Error(f"nbd_{method}: server replied with error to {asked} request: {reason}", errnum)


def _waiting(*origins: Any) -> list[Waiting]:
    """The pending exceptions of this thread whose origin is a given handle, None or BY_HANDLER."""
    # A copy of the list, because other threads may remove theirs meanwhile.
    return [one for one in list(pending) if one[0] == get_ident() and one[1] in origins]


def raise_pending(handle: Any, failed: BaseException | None = None) -> None:
    """Raise what callbacks and signal handlers raised during a call; report the rest.

    An exception of a signal handler is urgent, and so is a KeyboardInterrupt or SystemExit of a
    callback.  If there are several, one is raised now, and the others wait for the next calls.

    A signal handler may raise at any bytecode here.  So an exception is taken out of `pending` only
    while it is being raised: until then, the next call finds it.

    An exception refers to the frames that it passes through.  No frame may refer to the exception:
    such a cycle would keep the caller's buffer pinned until the next garbage collection.

    Args:
        handle: The shim's handle.
        failed: The exception of the call, if it failed.  It is raised here only with another
            exception as its cause; otherwise the caller raises it.
    """
    waiting = _waiting(handle, None, BY_HANDLER)
    urgent = [one for one in waiting if _is_urgent(one)]
    others = [one for one in waiting if not _is_urgent(one)]
    try:
        if urgent:
            _raise_waiting(urgent[0])
        if failed is not None and others:
            _raise_with_cause(failed, others.pop(0))
    finally:
        _report(others)
        del failed, waiting, urgent, others


def _is_urgent(one: Waiting) -> bool:
    _, origin, raised = one
    return (
        origin is BY_HANDLER
        or not isinstance(raised, Exception)
        or is_by_handler(raised.__traceback__)
    )


def is_by_handler(traceback: Any) -> bool:
    """Whether the handler of a signal raised an exception, judging by the traceback.

    Python calls a handler with the number of the signal and the frame that was interrupted.  Only
    trace functions also get a frame.  If the handler has overwritten its parameter, its code is
    compared with that of the handler that is now set for the number.  A call made where a function
    has just begun can only be that of a handler.
    """
    while traceback is not None and traceback.tb_next is not None:
        before, traceback = traceback, traceback.tb_next
        frame = traceback.tb_frame
        if _has_just_begun(before):
            return True
        for value in _arguments(frame):
            given = value if type(value) is tuple else (value,)
            if any(type(one) is type(frame) or _handles(frame, one) for one in given):
                return True
    return False


def _handles(frame: Any, number: object) -> bool:
    """Whether a frame runs the handler that is set for a signal."""
    if not isinstance(number, int) or not 0 < number < _signal.NSIG:
        return False
    handler: Any = _signal.getsignal(number)
    if not callable(handler):
        return False
    function = getattr(handler, "__func__", handler)  # of a method
    code = getattr(function, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
    return code is frame.f_code


def _has_just_begun(traceback: Any) -> bool:
    """Whether a frame was left at the first instruction of its function."""
    if not _RESUME:
        return False
    return bool(traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == _RESUME)


def _arguments(frame: Any) -> list[Any]:
    """The values of a function's parameters; a tuple for those of `*args`.

    Only the frame has them.  The handlers that are set now do not tell which function was called:
    a handler may have set another one before it raised.  The names of the parameters do not matter.
    """
    code, values = frame.f_code, frame.f_locals
    has_rest = bool(code.co_flags & _HAS_REST)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + has_rest]
    return [values[name] for name in names if name in values]


def _raise_waiting(one: Waiting) -> None:
    try:
        raise one[2]
    except BaseException:
        _take(one)
        raise
    finally:
        del one


def _raise_with_cause(failure: BaseException, one: Waiting) -> None:
    try:
        raise failure from one[2]
    except BaseException:
        _take(one)
        raise
    finally:
        del failure, one


def _take(one: Waiting) -> bool:
    """Take an exception out of `pending`; False if it was taken already.

    Garbage may be collected at any bytecode, and the destructor of a handle then reports exceptions
    whose handle is not known.
    """
    try:
        pending.remove(one)
    except ValueError:
        return False
    return True


def _report(waiting: list[Waiting]) -> None:
    """Pass exceptions to sys.unraisablehook, as the interpreter does with those of destructors.

    A destructor could not do it, because an exception that a signal handler raises there is lost.
    """
    while waiting:
        one = waiting.pop(0)
        if not _take(one):
            continue
        try:
            sys.unraisablehook(_unraisable(one[2]))
        except Exception as broken:
            sys.__unraisablehook__(_unraisable(broken))


def _unraisable(exception: BaseException) -> Any:
    """The argument for sys.unraisablehook."""
    fields = {
        "exc_type": type(exception),
        "exc_value": exception,
        "exc_traceback": exception.__traceback__,
        "err_msg": "Exception ignored in a callback of libnbd",
        "object": None,
    }
    if IS_CPYTHON:  # CPython's own hook takes only this type, which has no public name
        made: Any = next(c for c in tuple.__subclasses__() if c.__name__ == "UnraisableHookArgs")
        return made(fields.values())
    namespace: Any = type(sys.implementation)  # types.SimpleNamespace, without the import
    return namespace(**fields, extra_line="")
