"""Raise an exception at each place of a call where a signal handler could raise one.

A place is a bytecode of a frame of the package, including the functions that C calls. PyPy's trace
functions see lines only, so there a place is a line.
"""

from __future__ import annotations

import dis
import os
import sys
from types import FrameType
from typing import Any, Callable

import nbd

PACKAGE = os.path.dirname(nbd.__file__)
EVENT = "opcode" if sys.implementation.name == "cpython" else "line"


class Injected(KeyboardInterrupt):
    """The exception that is raised, as a signal handler would."""


class Injector:
    """Run a function, and raise an exception at one of its places.

    Attributes:
        raised: Whether it has raised.
        at_return: Whether that was where the outermost function of the package returns, which no
            `try` in it can enclose.  CPython runs no signal handler there.  On PyPy it is a line
            after what that function has called.
    """

    def __init__(self, place: int) -> None:
        """Raise at the place with this number, counted from 1."""
        self.left = place
        self.raised = self.at_return = False
        self._has_returned = False  # something that the outermost function has called

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Follow the frames of the package."""
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if EVENT == "opcode":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return self.step

    def step(self, frame: FrameType, event: str, argument: object) -> Any:
        """Count a place, and raise if it is the chosen one."""
        if event == EVENT:
            self.left -= 1
            if self.left == 0:
                self.raised = True
                self.at_return = _is_outermost(frame) and self._is_returning(frame)
                raise Injected
        elif event == "return" and frame.f_back is not None and _is_outermost(frame.f_back):
            self._has_returned = True
        return self.step

    def _is_returning(self, frame: FrameType) -> bool:
        if EVENT == "line":
            return self._has_returned
        return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")

    def run(self, function: Callable[[], object]) -> BaseException | None:
        """Run the function and return the exception that it raised, or None.

        The function runs in a generator, which has its own exception state: a trace function can
        raise where no signal handler does, in the middle of the end of an except clause.
        """
        usual = sys.gettrace()
        isolated = (function() for _ in "1")
        sys.settrace(self.trace)
        try:
            next(isolated)
        except BaseException as error:
            return error
        finally:
            sys.settrace(usual)
        return None


def _is_outermost(frame: FrameType) -> bool:
    """Return whether a frame of the package was called from outside of the package."""
    caller = frame.f_back
    is_ours = frame.f_code.co_filename.startswith(PACKAGE)
    return is_ours and caller is not None and not caller.f_code.co_filename.startswith(PACKAGE)


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an exception with its causes and contexts."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__]
    return found


def came_out(error: BaseException | None) -> bool:
    """Return whether the injected exception is the one that was raised, or in its chain."""
    return any(isinstance(one, Injected) for one in chain(error))


def exception_of_a_destructor() -> BaseException | None:
    """Return the exception raised inside a destructor, which the next call raises."""
    try:
        with nbd.NBD() as handle:
            handle.get_version()
    except KeyboardInterrupt as raised:
        return raised
    return None


def places(once: Callable[[Injector], None], most: int = 5000) -> int:
    """Call once(injector) for each place in turn; return the number of places."""
    for place in range(1, most):
        injector = Injector(place)
        once(injector)
        if not injector.raised:
            return place - 1
    raise AssertionError(f"there are more than {most} places")
