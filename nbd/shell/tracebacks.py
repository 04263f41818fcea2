# SPDX-License-Identifier: LGPL-2.0-or-later
"""Tracebacks of commands given with -c: with their source lines, without the shell's own frames.

This module is imported only when a command fails, because linecache and traceback import slowly.
"""

from __future__ import annotations

import io
import linecache
import sys
import traceback
from contextlib import redirect_stderr
from types import TracebackType

SHELL = "nbd.shell"

# Commands that fail in all the ways for which traceback imports modules of its own: the width of
# letters outside ASCII, carets below a part of a line, and suggestions.
_FAULTS = (
    *("fro é in (): pass", "(é := 1) / 0", "prnt", "''.lenght", "from sys import pth"),
    "import nbd.shell.nowhere",
)


def install(sources: dict[str, str]) -> None:
    """Show an exception that ends the process by `_show`, unless another hook is set.

    It must be called before the exception leaves the shell.  If a hook imports modules only when
    it runs, CPython does not end the process by SIGINT after a KeyboardInterrupt.
    """
    _remember(sources)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show


def show(error: BaseException, sources: dict[str, str]) -> None:
    """Print the traceback of `error`, which a command with one of these sources raised."""
    _remember(sources)
    _show(type(error), error, error.__traceback__)


def rehearse() -> None:
    """Show tracebacks of all kinds to nobody, so that Python imports now what it needs for them.

    Each version of Python needs others, and may import them as late as here.
    """
    with redirect_stderr(io.StringIO()):
        for text in _FAULTS:
            try:
                exec(compile(text, "<rehearsal>", "exec"), {})
            except Exception as error:
                show(error, {"<rehearsal>": text})
                sys.__excepthook__(type(error), error, error.__traceback__)
    del linecache.cache["<rehearsal>"]


def _remember(sources: dict[str, str]) -> None:
    for name, text in sources.items():
        lines = [line + "\n" for line in text.split("\n")]
        linecache.cache[name] = (len(text), None, lines, name)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    below = _below_shell(trace)
    # A command that does not compile has no frame, so the traceback is empty.
    if below is None and not isinstance(error, SyntaxError):
        below = trace
    traceback.print_exception(kind, error, below)


def _below_shell(trace: TracebackType | None) -> TracebackType | None:
    below = None
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == SHELL:
            below = trace.tb_next
        trace = trace.tb_next
    return below
