"""An exception at every place of a call where a signal handler could raise one.

A place is a bytecode that runs in a frame of the package, also in what C calls upwards.  PyPy tells
of lines only, so there a place is a line.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any, Callable

import nbd

PACKAGE = os.path.dirname(nbd.__file__)
EVENT = "opcode" if sys.implementation.name == "cpython" else "line"


class Injected(KeyboardInterrupt):
    """What a signal handler is made to raise."""


class Injector:
    """Runs a function, and raises at one place of it."""

    def __init__(self, place: int) -> None:
        """Raise at the place with this number; the first is 1."""
        self.left = place
        self.raised = False

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Follow the frames of the package."""
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if EVENT == "opcode":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return self.step

    def step(self, frame: FrameType, event: str, argument: object) -> Any:
        """Count a place, and raise if it is the one."""
        if event == EVENT:
            self.left -= 1
            if self.left == 0:
                self.raised = True
                raise Injected
        return self.step

    def run(self, function: Callable[[], object]) -> BaseException | None:
        """Run the function; returns what came out of it.

        In a generator, which has a state of its own of what is being handled: a trace function can
        raise where no signal handler does, in the midst of the end of an except clause.
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
    """Tell whether the injected exception is what came out, or a part of it."""
    return any(isinstance(one, Injected) for one in chain(error))


def places(once: Callable[[Injector], None], most: int = 5000) -> int:
    """Call once(injector) for each place until there are no more; returns how many there are."""
    for place in range(1, most):
        injector = Injector(place)
        once(injector)
        if not injector.raised:
            return place - 1
    raise AssertionError(f"there are more than {most} places")
