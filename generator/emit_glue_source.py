# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write nbdglue.c: each flat function enters the handle, calls libnbd, and leaves the handle.

The file also has the callbacks that libnbd calls.  They pass their arguments to the upcalls.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from generator.calls import (
    COUNTED,
    GRANTED,
    LOCK_FREE,
    changes_disk,
    moves_connection,
    takes_turn,
)
from generator.emit_glue_header import declare, prototype, returned_type
from generator.model import (
    CallbackArgument,
    CallbackKind,
    Closure,
    Function,
    Header,
    Kind,
    Parameter,
    Waits,
)
from generator.text import COLUMNS, banner_c, wrap_c

BANNER = banner_c(__name__)
INCLUDES = """\
#include "nbdglue.h"
#include "buffer.h"
#include "handle.h"
#include "wait.h"

#include <string.h>
"""
#: Return types that cannot hold a negative number.
UNSIGNED_64 = ("uint64_t", "uintptr_t", "size_t", "unsigned long", "unsigned long long")


def glue_source(header: Header) -> str:
    """The text of nbdglue.c."""
    blocks = [
        f"{BANNER}\n{INCLUDES}",
        *(upcall_function(closure) for closure in header.closures),
        *(glue_function(function) for function in header.functions),
    ]
    return "\n".join(blocks)


#: The first lines of a callback that may belong to a call that waits.
ORPHAN_LINES = """\
    if (closure->command != NULL && nbdshim_is_orphan(closure->command))
        return 0;
"""


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
    which would deadlock are refused.  When the process ends, Python may be gone; then the result is
    -1.  A completion needs more care:

    - libnbd 1.22 may call it a second time when the handle is closed.  The second call is ignored.
    - It must not be lost if a signal handler raises in Python before the upcall has done anything.
      So the upcall is repeated.
    - If it returned 1, Python has already released the token.

    Other callbacks may belong to a call that waits.  They are counted for that call, and ignored
    once it was stopped.
    """
    name = closure.name
    passed = []
    asserts = ""
    for argument in closure.arguments:
        passed += upcall_arguments(argument)
        if name == "debug" and argument.name == "context":
            passed[-1] = "nbdshim_name_of_call(closure->s, context)"
        if argument.kind is CallbackKind.PAIRS:
            asserts = (
                f"_Static_assert(sizeof({argument.ctype}) == 2 * sizeof(uint64_t),\n"
                f'               "{argument.ctype} is read as two uint64_t");\n\n'
            )
    head = wrap_c(
        f"static int call_{name}({', '.join(['void *user_data', *libnbd_parameters(closure)])})"
    )
    call = wrap_c(f"    int ret = nbdshim_up.{name}({', '.join(['closure->token', *passed])});")
    once = ORPHAN_LINES
    spent = ""
    if name == "completion":
        again = call.replace("int ret", "    ret", 1)
        is_due = "ret == NBDSHIM_NOT_DONE"
        call += f"\n\n    for (int i = 1; i < NBDSHIM_MAX_TRIES && {is_due}; i++)\n{again}"
        once = "    if (closure->completed)\n        return 0;\n    closure->completed = true;\n"
        spent = "    if (ret == 1)\n        closure->released = true;\n"
    return (
        f"{asserts}/* libnbd's {name} callback: calls upwards and returns the result. */\n"
        f"{head}\n{{\n"
        "    struct nbdshim_closure *closure = user_data;\n"
        f"    struct nbdshim_upcall upcall;\n\n{once}"
        "    if (nbdshim_is_silent())\n        return -1;\n"
        f"    nbdshim_enter_upcall(&upcall, closure->s, {str(name == 'debug').lower()});\n"
        f"{call}\n"
        "    nbdshim_leave_upcall(&upcall);\n"
        f"{spent}    return ret;\n}}\n"
    )


def upcall_arguments(argument: CallbackArgument) -> list[str]:
    """The arguments of the upcall for one argument of libnbd's callback.

    A part of the command's buffer is passed as its offset, because Python has the buffer.
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
    """The arguments of libnbd's function for one parameter."""
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
    if function.waits is Waits.BY_HAND:
        arguments = ["s", *(p.name for p in function.parameters)]
        lines.append(f"    return nbdshim_{function.name}({', '.join(arguments)});")
        return "\n".join([*lines, "}", ""])
    lines += refusal(function)
    lines += clearing(function)
    for parameter in function.closures:
        lines += closure_struct(parameter)
    lines += waiting_call(function) if function.waits in ENDS else plain_call(function)
    return "\n".join([*lines, "}", ""])


#: Calls that the shim implements itself instead of calling libnbd.
OF_THE_SHIM = ("set_pread_initialize", "get_pread_initialize")


def plain_call(function: Function) -> list[str]:
    """Call libnbd's function, and leave the handle."""
    arguments = ["s->h", *(a for p in function.parameters for a in passed_on(p))]
    result = declare(returned_type(function), "ret")
    call = f"nbd_{function.name}({', '.join(arguments)})"
    if function.name in OF_THE_SHIM:
        call = f"nbdshim_{function.name}({', '.join(['s', *arguments[1:]])})"
    lines = [wrap_c(f"    {result} = {call};")]
    lines += afterwards(function)
    if is_wide(function):
        lines.append(f'    ret = nbdshim_number(ret, "nbd_{function.name}");')
    if takes_turn(function):
        return [*lines, "", "    (void)nbdshim_end(&wait, ret == -1 ? -1 : 0);", "    return ret;"]
    return [*lines, "", "    nbdshim_leave(s);", "    return ret;"]


#: The last call of a function that calls nbd_aio_X and then waits, by what it waits for.
ENDS = {
    Waits.COMMAND: "nbdshim_end_command(&wait, ret)",
    Waits.OPTION: "nbdshim_end_option(&wait, ret, {answer})",
    Waits.CONNECT: "nbdshim_end_connect(&wait, ret)",
}


def waiting_call(function: Function) -> list[str]:
    """Call the form of libnbd's function that does not wait, and then wait in the shim."""
    arguments = ["s->h"]
    for parameter in function.parameters:
        if parameter.name == "flags" and function.waits is Waits.COMMAND:
            arguments.append("nbdshim_completion(&wait)")
        arguments += passed_on(parameter)
    if function.waits is Waits.OPTION:
        arguments.append("nbdshim_completion(&wait)")
    result = "int64_t ret" if function.waits is Waits.COMMAND else "int ret"
    call = f"    {result} = nbd_{function.aio_name}({', '.join(arguments)});"
    end = ENDS[function.waits].format(answer=answer(function))
    return [wrap_c(call), *afterwards(function), "", f"    return {end};"]


def answer(function: Function) -> str:
    """The meaning of the reply to an option (enum nbdshim_answer)."""
    if function.name in GRANTED:
        return "NBDSHIM_GRANTED"
    return "NBDSHIM_ITEMS" if function.name in COUNTED else "NBDSHIM_SUCCESS"


def afterwards(function: Function) -> list[str]:
    """The lines that record changes of the buffer and the socket after libnbd's function.

    The shim has a duplicate of the connection's socket.  It makes the duplicate after connecting,
    and closes it after the connection has ended.
    """
    lines = []
    if function.filled_later:
        lines += ["", "    if (was_stale)"]
        lines += [f"        nbdshim_set_clean({function.filled_later.name}_state);"]
    if function.waits is not Waits.IN_LIBNBD or takes_turn(function):
        return lines  # nbdshim_end and its variants do the rest
    if function.name.startswith("aio_connect"):
        lines += ["", "    if (ret != -1)", "        nbdshim_note_socket(s);"]
    elif function.name == "aio_disconnect":
        lines += ["", "    if (ret == 0)", "        nbdshim_note_disconnect(s);"]
    elif moves_connection(function) and refused_value(function) == "refused":
        lines += ["", "    if (ret == -1)", "        nbdshim_note_end(s);"]
    return lines


def is_wide(function: Function) -> bool:
    """Whether a call may return a number of the server that libnbd does not check.

    Such a number may be negative and look like a failure, so nbdshim_number checks it.
    """
    return function.returns in ("int64_t", "ssize_t") and not function.closures


def ownership(function: Function) -> str:
    """The part of a flat function's comment on the ownership of its arguments and its result."""
    names = [p.name for p in function.closures]
    sentences = (
        [f"{' and '.join(names)} {'are tokens' if names[1:] else 'is a token'}."] if names else []
    )
    if function.buffer and function.is_asynchronous:
        sentences.append(f"{function.buffer.name} stays in place until the last token is released.")
    if function.filled_later:
        sentences.append(f"*{function.filled_later.name}_state is an enum nbdshim_state.")
    if function.returns == "char *":
        sentences.append("The caller frees what it returns.")
    return "".join(f" {sentence}" for sentence in sentences)


def comment(text: str) -> str:
    """A C comment of one or more lines."""
    if len(text) <= COLUMNS - len("/*  */"):
        return f"/* {text} */"
    lines = textwrap.wrap(text, COLUMNS - len(" * "))
    return "\n".join(["/*", *(f" * {line}" for line in lines), " */"])


def refusal(function: Function) -> list[str]:
    """Enter the handle and hold the tokens.  Return if the shim refuses either."""
    enter = entering(function)
    lines = [f"    struct nbdshim_closure *{p.name}_closure;" for p in function.closures]
    if "wait" in enter:
        lines.append("    struct nbdshim_wait wait;")
    if "plan" in enter:
        lines += plan(function)
    lines += [wrap_c(f"    int refused = {enter};"), ""]
    lines += ["    if (refused)", f"        return {refused_value(function)};"]
    return [*lines, *holding(function)]


def entering(function: Function) -> str:
    """The call by which a flat function enters the handle."""
    if function.waits in (Waits.COMMAND, Waits.OPTION):
        return f'nbdshim_begin_command(&wait, s, "nbd_{function.name}", &plan)'
    if function.waits is Waits.CONNECT or takes_turn(function):
        return f'nbdshim_begin(&wait, s, "nbd_{function.name}")'
    return "nbdshim_enter_unlocked(s)" if function.name in LOCK_FREE else "nbdshim_enter(s)"


def plan(function: Function) -> list[str]:
    """The struct nbdshim_plan of a command or an option, for nbdshim_begin_command.

    If the command changes its range of the disk, and is stopped, later commands may not overlap the
    range.
    """
    names = [p.name for p in function.parameters]
    count = function.buffer.length if function.buffer else "count" if "count" in names else ""
    fields = [f".size = {function.buffer.length}"] if function.buffer else []
    if function.has_buffer_alone:
        fields.append(".has_buffer_alone = true")
    if changes_disk(function):
        fields.append(".changes = true")
    if "offset" in names and count:
        fields += [".offset = offset", f".count = {count}"]
    if not fields:
        return ["    const struct nbdshim_plan plan = {0};"]
    return [
        "    const struct nbdshim_plan plan = {",
        *(f"        {field}," for field in fields),
        "    };",
    ]


def holding(function: Function) -> list[str]:
    """Hold the tokens of a call that has entered the handle.  If memory runs out, leave again."""
    names = [p.name for p in function.closures]
    if not names:
        return []
    buffer = function.buffer.name if function.buffer else "NULL"
    waits = function.waits in (Waits.COMMAND, Waits.OPTION)
    command = "wait.command" if waits else "NULL"
    made = [f"nbdshim_closure_new(s, {n}, {buffer}, {command}, &{n}_closure)" for n in names]
    leave = ["        return nbdshim_end(&wait, refused);"]
    if not waits:
        leave = ["        nbdshim_leave(s);", f"        return {refused_value(function)};"]
    return [
        "    refused = " + " |\n              ".join(made) + ";",
        "    if (refused) {",
        *(f"        nbdshim_closure_drop({name}_closure);" for name in names),
        *leave,
        "    }",
    ]


def refused_value(function: Function) -> str:
    """The result of a refused call: the reason as a negative number, if the type can hold one.

    Otherwise the caller asks nbdshim_check for the reason.
    """
    if returned_type(function).endswith("*"):
        return "NULL"
    return "0" if function.returns in UNSIGNED_64 else "refused"


def clearing(function: Function) -> list[str]:
    """Fill the caller's buffer with zeroes before a read, instead of libnbd.

    A stale buffer has old bytes that Python code must not see if the read fails.  Any other buffer
    is cleared by calls that do not wait, unless set_pread_initialize turned that off.
    """
    filled = function.filled_later
    if filled is None:
        return []
    is_cleared = "was_stale"
    if function.is_asynchronous:
        is_cleared += " || nbdshim_get_pread_initialize(s)"
    return [
        f"    bool was_stale = nbdshim_claim_stale({filled.name}_state);",
        f"    if ({is_cleared})",
        f"        memset({filled.name}, 0, {filled.length});",
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
