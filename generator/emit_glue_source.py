# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write nbdglue.c: each flat function enters the handle, calls libnbd, and leaves the handle.

The file also has the callbacks that libnbd calls.  They pass their arguments on to the upcalls.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from generator.calls import LOCK_FREE, moves_connection
from generator.emit_glue_header import declare, prototype, returned_type
from generator.model import (
    CallbackArgument,
    CallbackKind,
    Closure,
    Function,
    Header,
    Kind,
    Parameter,
)
from generator.text import COLUMNS, banner_c, wrap_c

BANNER = banner_c(__name__)
#: Return types that have no room for a negative number.
UNSIGNED_64 = ("uint64_t", "uintptr_t", "size_t", "unsigned long", "unsigned long long")


def glue_source(header: Header) -> str:
    """The text of nbdglue.c."""
    blocks = [
        f'{BANNER}\n#include "nbdglue.h"\n#include "handle.h"\n\n#include <string.h>\n',
        "/* The functions to call upwards; nbdshim_register sets them once. */\n"
        "extern struct nbdshim_upcalls nbdshim_up;\n",
        *(upcall_function(closure) for closure in header.closures),
        *(glue_function(function) for function in header.functions),
    ]
    return "\n".join(blocks)


def libnbd_parameters(closure: Closure) -> Iterator[str]:
    """The parameters of a callback as libnbd calls it, without the first one, user_data."""
    for argument in closure.arguments:
        is_array = argument.kind in (CallbackKind.INTS, CallbackKind.PAIRS)
        yield declare(f"{argument.ctype} *" if is_array else argument.ctype, argument.name)
        if argument.length:
            yield f"size_t {argument.length}"


def upcall_function(closure: Closure) -> str:
    """The C function that libnbd calls for a callback type.  It makes the upcall.

    During the upcall the thread is marked as being inside a callback of this handle, so that calls
    which would deadlock are refused.  At the end of the process there may be no Python to call any
    more: then the result is -1.  A completion needs more care:

    - libnbd 1.22 may call it a second time when the handle is closed.  Only the first time counts.
    - It must not be lost if a signal handler raises in Python before the upcall has done anything.
      Then the upcall is made again.
    - If it returned 1, Python has already released the token.
    """
    name = closure.name
    passed = []
    asserts = ""
    for argument in closure.arguments:
        passed += upcall_arguments(argument)
        if argument.kind is CallbackKind.PAIRS:
            asserts = (
                f"_Static_assert(sizeof({argument.ctype}) == 2 * sizeof(uint64_t),\n"
                f'               "{argument.ctype} is read as two uint64_t");\n\n'
            )
    head = wrap_c(
        f"static int call_{name}({', '.join(['void *user_data', *libnbd_parameters(closure)])})"
    )
    call = wrap_c(f"    int ret = nbdshim_up.{name}({', '.join(['closure->token', *passed])});")
    once = spent = ""
    if name == "completion":
        again = call.replace("int ret", "    ret", 1)
        call += (
            f"\n\n    for (int i = 1; i < NBDSHIM_TRIES && ret == NBDSHIM_NOT_DONE; i++)\n{again}"
        )
        once = "    if (closure->completed)\n        return 0;\n    closure->completed = true;\n"
        spent = "    if (ret == 1)\n        closure->released = true;\n"
    return (
        f"{asserts}/* libnbd's {name} callback: calls upwards and returns the result. */\n"
        f"{head}\n{{\n"
        "    struct nbdshim_closure *closure = user_data;\n"
        f"    struct nbdshim_upcall upcall;\n\n{once}"
        "    if (nbdshim_is_silent())\n        return -1;\n"
        f"    nbdshim_call_up(&upcall, closure->s, {str(name == 'debug').lower()});\n"
        f"{call}\n"
        "    nbdshim_came_back(&upcall);\n"
        f"{spent}    return ret;\n}}\n"
    )


def upcall_arguments(argument: CallbackArgument) -> list[str]:
    """The arguments of the upcall for one argument of libnbd's callback.

    A part of the command's buffer is passed as its offset in the buffer: Python has the buffer.
    """
    name = argument.name
    if argument.kind is CallbackKind.ERROR:
        return [f"*{name}", f"(uintptr_t){name}"]
    if argument.kind is CallbackKind.PAIRS:
        name = f"(const uint64_t *){name}"
    elif argument.kind is CallbackKind.VIEW:
        name = f"(size_t)((const char *){name} - closure->buffer)"
    return [name, argument.length] if argument.length else [name]


def passed_on(parameter: Parameter) -> Iterator[str]:
    """The arguments for libnbd's function that are made from one parameter."""
    if parameter.kind is Kind.CLOSURE:
        yield f"{parameter.name}_callback"
    elif parameter.kind is Kind.ADDRESS:
        yield parameter.name
        yield f"(socklen_t){parameter.length}"
    else:
        yield parameter.name
        if parameter.length:
            yield parameter.length


def glue_function(function: Function) -> str:
    """One flat function: it enters the handle, calls libnbd and leaves the handle."""
    lines = [
        comment(f"nbd_{function.name}.{ownership(function)}"),
        wrap_c(prototype(function)),
        "{",
    ]
    lines += refusal(function)
    lines += clearing(function)
    for parameter in function.closures:
        lines += closure_struct(parameter)
    arguments = ["s->h", *(a for p in function.parameters for a in passed_on(p))]
    # Polling may wait.  The shim needs the socket before that, or nbdshim_close in another thread
    # could not end the waiting.
    if function.name.startswith(("poll", "aio_notify")):
        lines += ["    if (nbd_aio_is_connecting(s->h))", "        nbdshim_note_socket(s);"]
    result = declare(returned_type(function), "ret")
    lines.append(wrap_c(f"    {result} = nbd_{function.name}({', '.join(arguments)});"))
    lines += afterwards(function)
    checked = f'nbdshim_number(ret, "nbd_{function.name}")' if is_wide(function) else "ret"
    if checked != "ret":
        lines.append(f"    ret = {checked};")
    lines += ["", "    nbdshim_leave(s);", "    return ret;", "}", ""]
    return "\n".join(lines)


def afterwards(function: Function) -> list[str]:
    """What the shim records after libnbd's function has returned.

    This is about the state of the buffer, and about the socket of the connection: the shim has a
    duplicate of it, which it makes after connecting and closes after the connection has ended.
    """
    lines = []
    if function.filled_later:
        lines += ["", "    if (was_stale)"]
        lines += [f"        nbdshim_set_clean({function.filled_later.name}_state);"]
    if function.name.startswith(("connect_", "aio_connect")):
        lines += ["", "    if (ret != -1)", "        nbdshim_note_socket(s);"]
    elif function.name == "shutdown":
        lines += ["", "    nbdshim_note_end(s);"]
    elif moves_connection(function) and refused_value(function) == "refused":
        lines += ["", "    if (ret == -1)", "        nbdshim_note_end(s);"]
    return lines


def is_wide(function: Function) -> bool:
    """Whether a call may return a number that comes from the server without a check by libnbd.

    Such a number may be negative and look like a failure, so nbdshim_number examines it.
    """
    return function.returns in ("int64_t", "ssize_t") and not function.closures


def ownership(function: Function) -> str:
    """What the comment of a flat function says after its name: who owns what for how long."""
    names = [p.name for p in function.closures]
    told = (
        [f"{' and '.join(names)} {'are tokens' if names[1:] else 'is a token'}."] if names else []
    )
    if function.buffer and function.is_asynchronous:
        told.append(f"{function.buffer.name} stays in place until the last token is released.")
    if function.filled_later:
        told.append(f"*{function.filled_later.name}_state is an enum nbdshim_state.")
    if function.returns == "char *":
        told.append("The caller frees what it returns.")
    return "".join(f" {sentence}" for sentence in told)


def comment(text: str) -> str:
    """A C comment of one line or more."""
    if len(text) <= COLUMNS - len("/*  */"):
        return f"/* {text} */"
    lines = textwrap.wrap(text, COLUMNS - len(" * "))
    return "\n".join(["/*", *(f" * {line}" for line in lines), " */"])


def refusal(function: Function) -> list[str]:
    """Enter the handle and hold the tokens.  Return if the shim refuses one of these.

    A refused call fills the memory for its result with zeroes, as libnbd does when it fails.
    """
    enter = "nbdshim_enter_unlocked(s)" if function.name in LOCK_FREE else "nbdshim_enter(s)"
    undo = []
    if function.buffer and function.buffer.kind is Kind.ROOM and not function.filled_later:
        undo.append(f"        memset({function.buffer.name}, 0, {function.buffer.length});")
    lines = [f"    struct nbdshim_closure *{p.name}_closure;" for p in function.closures]
    lines += [f"    int refused = {enter};", ""]
    lines += ["    if (refused) {", *undo] if undo else ["    if (refused)"]
    lines.append(f"        return {refused_value(function)};")
    return [*lines, *(["    }"] if undo else []), *holding(function, undo)]


def holding(function: Function, undo: Sequence[str]) -> list[str]:
    """Hold the tokens of a call that has entered.  Without memory for that, undo it and leave."""
    names = [p.name for p in function.closures]
    if not names:
        return []
    buffer = function.buffer.name if function.buffer else "NULL"
    made = [f"nbdshim_closure_new(s, {name}, {buffer}, &{name}_closure)" for name in names]
    return [
        "    refused = " + " |\n              ".join(made) + ";",
        "    if (refused) {",
        *(f"        nbdshim_closure_drop({name}_closure);" for name in names),
        *undo,
        "        nbdshim_leave(s);",
        f"        return {refused_value(function)};",
        "    }",
    ]


def refused_value(function: Function) -> str:
    """What a refused call returns: the reason as a negative number, if its type has room for one.

    If it has none, the caller asks nbdshim_check for the reason.
    """
    if returned_type(function).endswith("*"):
        return "NULL"
    return "0" if function.returns in UNSIGNED_64 else "refused"


def clearing(function: Function) -> list[str]:
    """Fill the memory that libnbd reads into with zeroes, if libnbd does not do it.

    The memory may hold old bytes that Python code must not see when the read fails.  Libnbd clears
    it by default, but set_pread_initialize(False) stops that; from then on the shim does it.
    """
    if function.name == "set_pread_initialize":
        (initialize,) = function.parameters
        return [f"    if (!{initialize.name})", "        nbdshim_note_leaving_old(s);"]
    filled = function.buffer
    if filled is None or filled.kind is not Kind.ROOM:
        return []
    clear = f"        memset({filled.name}, 0, {filled.length});"
    if filled is not function.filled_later:
        return ["    if (nbdshim_leaves_old(s))", clear]
    return [
        f"    bool was_stale = nbdshim_claim_stale({filled.name}_state);",
        "    if (was_stale && nbdshim_leaves_old(s))",
        clear,
    ]


def closure_struct(parameter: Parameter) -> list[str]:
    """The struct that libnbd takes for one callback."""
    name = parameter.name
    call = f"call_{parameter.closure}"
    callback = f"has_{name} ? {call} : NULL" if parameter.optional else call
    return [
        f"    {parameter.ctype} {name}_callback = {{",
        f"        .callback = {callback},",
        f"        .user_data = {name}_closure,",
        "        .free = nbdshim_closure_free,",
        "    };",
    ]
