# SPDX-License-Identifier: LGPL-2.0-or-later
"""Find the calls that wait, and how the shim can stop them.

libnbd's own calls cannot be stopped while they wait.  If nbd_aio_X does the same as nbd_X without
waiting, the shim calls nbd_aio_X, and waits itself (csrc/wait.h).
"""

from __future__ import annotations

from dataclasses import replace

from generator.model import Function, Header, Kind, Parameter, Waits

#: Calls that follow no rule: the shim has a function for each.
BY_HAND = frozenset(
    {"aio_notify_read", "aio_notify_write", "opt_abort", "poll", "poll2", "shutdown"}
)


def stoppable(header: Header) -> Header:
    """The same header, in which each call knows how it waits, with additional calls X_into.

    X_into exists for each nbd_X that waits and reads data.  It reads into memory of the caller,
    while X allocates memory.
    """
    by_name = {function.name: function for function in header.functions}
    functions = []
    for function in header.functions:
        waits = waiting(function, by_name.get(f"aio_{function.name}"))
        found = replace(function, waits=waits)
        functions.append(found)
        if found.has_buffer_alone and found.buffer and found.buffer.kind is Kind.OUTPUT:
            functions.append(replace(found, name=f"{found.name}_into", form_of=found.name))
    return replace(header, functions=tuple(functions))


def waiting(function: Function, aio: Function | None) -> Waits:
    """How a call waits; `aio` is the call nbd_aio_X, if libnbd has one."""
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
    """The parameters of a call with a completion callback before `flags`, or at the end."""
    rest = [p for p in function.parameters if p.name == "flags"]
    return [*(p for p in function.parameters if p.name != "flags"), *completions, *rest]
