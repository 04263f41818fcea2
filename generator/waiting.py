# SPDX-License-Identifier: LGPL-2.0-or-later
"""Find the calls that wait, and how the shim makes each of calls that do not wait.

libnbd's own calls cannot be stopped while they wait.  Where nbd_aio_X does what nbd_X does, but
does not wait, the shim calls that, and waits by itself (csrc/wait.h).
"""

from __future__ import annotations

from dataclasses import replace

from generator.model import Function, Header, Kind, Parameter, Waits

#: Calls that wait in a way of their own: the shim has a function for each.
BY_HAND = frozenset(
    {"aio_notify_read", "aio_notify_write", "opt_abort", "poll", "poll2", "shutdown"}
)


def stoppable(header: Header) -> Header:
    """The same header, which says of each call how it waits, and has calls that read into a buffer.

    For nbd_X that reads into new memory, there is one call more: X_into, which reads into memory of
    the caller.
    """
    by_name = {function.name: function for function in header.functions}
    functions = []
    for function in header.functions:
        waits = waiting(function, by_name.get(f"aio_{function.name}"))
        found = replace(function, waits=waits)
        functions.append(found)
        if found.has_buffer_alone and found.buffer and found.buffer.kind is Kind.ROOM:
            functions.append(replace(found, name=f"{found.name}_into", form_of=found.name))
    return replace(header, functions=tuple(functions))


def waiting(function: Function, aio: Function | None) -> Waits:
    """How a call waits; `aio` is the call of the same name that does not wait."""
    if function.name in BY_HAND:
        return Waits.BY_HAND
    if aio is None or function.returns != "int":
        return Waits.IN_LIBNBD
    if aio.parameters == function.parameters and function.name.startswith("connect_"):
        return Waits.CONNECT
    completions = [p for p in aio.parameters if p.closure == "completion"]
    if [*aio.parameters] != with_completion(function, completions):
        return Waits.IN_LIBNBD
    if function.name.startswith("opt_"):
        return Waits.OPTION if aio.returns == "int" else Waits.IN_LIBNBD
    return Waits.COMMAND if aio.returns == "int64_t" else Waits.IN_LIBNBD


def with_completion(function: Function, completions: list[Parameter]) -> list[Parameter]:
    """The parameters of a call, and a completion callback: before `flags`, or at the end."""
    rest = [p for p in function.parameters if p.name == "flags"]
    return [*(p for p in function.parameters if p.name != "flags"), *completions, *rest]
