# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write upcalls.py: the Python functions that the shim calls, one for each callback type."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from generator.model import ORPHAN_PIN, CallbackArgument, CallbackKind, Closure, Header
from generator.text import banner, wrap

BANNER = banner(__name__)


def upcalls_module(header: Header) -> str:
    """The text of upcalls.py."""
    functions = [closure_function(closure) for closure in header.closures]
    used = "".join(functions)
    converters = [name for name in ("pairs", "string") if f"{name}(" in used]
    converters.append("unpack")
    shim = [name for name in ("as_text",) if f"{name}(" in used]
    head = f'''\
{BANNER}"""What the shim calls: they convert the arguments and call the callables."""

from __future__ import annotations

from sys import _getframe

from nbd._binding.callbacks import (
    ErrorNumber,
    already_called,
    as_int,
    bring_back,
    forget,
    keep,
    registry,
    set_errno,
)
from nbd._binding.convert import {", ".join(converters)}
from nbd._binding.memory import BOUNCES, part
from nbd._binding.shim import {", ".join([*shim, "install", "upcall"])}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@upcall("release")
def release(tokens: Any, count: int) -> int:
    """Remove the entries of tokens that libnbd no longer uses.  Some may be removed already."""
    for token in unpack(tokens, count):
        forget(token, None)
    return 0


@upcall("interrupted")
def interrupted() -> int:
    """Let signal handlers run while a call waits: Python runs them between bytecodes."""
    return 0


@upcall("orphaned")
def orphaned(token: int) -> int:
    """Keep the memory of a command that is being stopped, until its reply has arrived.

    The method that called the shim has the pin in its variable {ORPHAN_PIN}.  It cannot put the pin
    into the registry itself, because a signal handler may raise before and after each of its
    bytecodes.  If a handler raises in this function, the shim calls it again.
    """
    registry[token] = _getframe(1).f_locals["{ORPHAN_PIN}"]
    return 0
'''
    return "\n\n".join([head, *functions, "install()\n"])


def closure_function(closure: Closure) -> str:
    """The function for one callback type."""
    parameters = ["token: int"]
    for argument in closure.arguments:
        parameters += upcall_parameters(argument)
    lines = completion_lines(closure) if closure.name == "completion" else callback_lines(closure)
    lines = ["try:", *lines, "except BaseException as raised:", "    return keep(raised, token)"]
    if closure.name == "completion":
        lines = [*ARRIVAL_LINES, *lines]
    signature = wrap(f"def {closure.name}_upcall({', '.join(parameters)}) -> int:", 0)
    doc = f'    """Run the {closure.name} callback that token stands for."""'
    body = textwrap.indent("\n".join(lines), "    ")
    return f'@upcall("{closure.name}")\n{signature}\n{doc}\n{body}\n'


def upcall_parameters(argument: CallbackArgument) -> Iterator[str]:
    """The parameters of an upcall for one argument of a callback.

    Their order must be that of emit_glue_header.upcall_parameters.
    """
    if argument.kind is CallbackKind.VIEW:
        yield f"{argument.name}_at: int"
    elif argument.kind in (CallbackKind.INT, CallbackKind.ERROR):
        yield f"{argument.name}: int"
    else:
        yield f"{argument.name}: Any"
    if argument.kind is CallbackKind.ERROR:
        yield f"{argument.name}_at: int"
    if argument.length:
        yield f"{argument.length}: int"


def callback_lines(closure: Closure) -> list[str]:
    """The body of the function for every callback type except completion."""
    entry = "callback, _, target, pin" if closure.has_buffer else "callback"
    return [
        f"    {entry} = registry[token]" + ("" if closure.has_buffer else "[0]"),
        *text_lines([a.name for a in closure.arguments if a.kind is CallbackKind.STRING]),
        *called(closure),
        *NONE_LINES,
        "    return result if result.__class__ is int else as_int(result)",
    ]


def text_lines(names: Sequence[str]) -> list[str]:
    """Convert C strings to str.

    Nearly all are UTF-8, and decoding them here is faster than calling as_text.
    """
    if not names:
        return []
    strings = ", ".join(names)
    return [
        "    try:",
        f"        {strings} = " + ", ".join(f"string({name}).decode()" for name in names),
        "    except UnicodeDecodeError:",
        f"        {strings} = " + ", ".join(f"as_text({name})" for name in names),
    ]


def called(closure: Closure) -> list[str]:
    """Call the user's callable.

    If it changed the errno, libnbd gets the new value, even if the callable raised an exception.
    """
    passed = ", ".join(callback_argument(a.name, a.kind, a.length) for a in closure.arguments)
    call = f"result = callback({passed})"
    errors = [a.name for a in closure.arguments if a.kind is CallbackKind.ERROR]
    lines = [line for name in errors for line in cell_lines(name)]
    if closure.name == "completion":
        lines.append(SPENT_LINE)
    if not errors:
        return textwrap.indent(wrap(call, 8), "    ").splitlines()
    lines += ["    try:", *textwrap.indent(wrap(call, 12), " " * 8).splitlines()]
    lines.append("    finally:")
    for name in errors:
        lines.append(f"        if {name}_cell.value != {name}:")
        lines.append(f"            set_errno({name}_at, {name}_cell.value)")
    return lines


def cell_lines(name: str) -> list[str]:
    """Put the errno into an object, which the callable may change."""
    return [f"    {name}_cell = ErrorNumber()", f"    {name}_cell.value = {name}"]


#: Most callbacks return None, so this is tested first: it is faster than checking the class.
NONE_LINES = ["    if result is None:", "        return 0"]

#: The first lines of a completion, which are outside its `try`.  If a signal handler raises here,
#: the exception leaves the function, and the shim calls the function again: so it must be possible
#: to run these lines twice.  On PyPy, where libnbd reads into a bounce buffer, bring_back copies
#: the bytes to the caller's object.
ARRIVAL_LINES = [
    "entry = registry.get(token)",
    "if entry is None:  # it was retired below, and the exception came after that",
    "    return 1",
    "if BOUNCES and entry[2] is not None:",
    "    bring_back(token)",
]

#: The last line before the callable is called.  If the exception of a signal handler leaves the
#: function after it, the shim calls the function again, which then calls already_called.
SPENT_LINE = "    entry[0] = already_called"


def completion_lines(closure: Closure) -> list[str]:
    """The body of the function for completions.

    If the callable returns 1, the command is retired, and its token is forgotten at once, which
    saves an upcall of `release`.  Most callbacks are completions, so this code is optimised.
    """
    return [
        "    callback = entry[0]",
        "    if callback is None:",
        "        return 0",
        *called(closure),
        *NONE_LINES,
        "    if result.__class__ is not int:",
        "        result = as_int(result)",
        "    if result == 1:",
        "        forget(token, None)",
        "    return result",
    ]


def callback_argument(name: str, kind: CallbackKind, length: str) -> str:
    """The Python expression for one argument of a callback."""
    return {
        CallbackKind.INT: name,
        CallbackKind.STRING: name,
        CallbackKind.ERROR: f"{name}_cell",
        CallbackKind.VIEW: f"part(target, pin, {name}_at, {length})",
        CallbackKind.INTS: f"unpack({name}, {length})",
        CallbackKind.PAIRS: f"pairs({name}, {length})",
    }[kind]
