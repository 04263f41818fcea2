# SPDX-License-Identifier: LGPL-2.0-or-later
"""What C declarations do not express: the meaning of results, locking, and the documentation.

Rules by name and type cover most calls.  The tables list the exceptions.  A call of a newer libnbd,
which is in no table, is bound by the rules alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from generator.model import Function, Header, Kind, Parameter

DOCS = Path(__file__).with_name("docs")


class Returns(Enum):
    """The kind of a result: it determines what a method returns and what a failure looks like."""

    NOTHING = "None"
    TRUTH = "bool"
    NUMBER = "int"
    UNSIGNED = "an int that is never a failure"
    TEXT = "str that libnbd keeps"
    OWNED_TEXT = "str that the caller frees"


#: Calls that ask the server for an option.  They return whether the server granted it; a refusal is
#: not a failure.
GRANTED = frozenset({"opt_starttls", "opt_extended_headers", "opt_structured_reply"})

#: Calls that return the number of items that their callback received.  Those that do not wait
#: return 0, because the items have not arrived yet.
COUNTED = frozenset(
    {
        "opt_list",
        "opt_list_meta_context",
        "opt_list_meta_context_queries",
        "opt_set_meta_context",
        "opt_set_meta_context_queries",
        "aio_opt_list_meta_context",
        "aio_opt_list_meta_context_queries",
        "aio_opt_set_meta_context",
        "aio_opt_set_meta_context_queries",
    }
)

#: Calls for which libnbd does not lock the handle.  A callback runs while the handle is locked, so
#: it may make only these calls on its own handle.  The debug callback may not make any: every call
#: runs it, so the recursion would not end.
LOCK_FREE = frozenset(
    {
        "set_private_data",
        "get_private_data",
        "aio_get_direction",
        "aio_is_created",
        "aio_is_connecting",
        "aio_is_negotiating",
        "aio_is_ready",
        "aio_is_processing",
        "aio_is_dead",
        "aio_is_closed",
        "get_package_name",
        "get_version",
        "get_version_extra",
        "supports_tls",
        "supports_uri",
        "supports_vsock",
    }
)


#: The prefixes of calls that only set, return or signal something.  They do not change the state of
#: the connection.
PASSIVE = (
    "set_",
    "get_",
    "is_",
    "can_",
    "add_",
    "clear_",
    "supports_",
    "kill_",
    "aio_get_",
    "aio_is_",
)


def moves_connection(function: Function) -> bool:
    """Whether a call may send, receive, or end the connection.

    A call for which this is wrongly true only takes a little longer when it fails.
    """
    return function.name not in LOCK_FREE and not function.name.startswith(PASSIVE)


def takes_turn(function: Function) -> bool:
    """Whether a call needs the turn: it is made while no other call waits on the handle.

    Such a call may wait inside libnbd.  Or it asks which command has completed: the answer must not
    be a command that another call is about to retire.
    """
    if function.name == "aio_peek_command_completed":
        return True
    may_wait = moves_connection(function) and not function.is_asynchronous
    return may_wait and function.returns == "int"


#: The prefixes of commands that query or prefetch a range of the disk.
HARMLESS = ("block_status", "cache")


def changes_disk(function: Function) -> bool:
    """Whether a command may change its range of the disk.

    If this is wrongly true, and the command is stopped, later commands for the same range wait for
    its reply.
    """
    reads = function.buffer is not None and function.buffer.kind is Kind.OUTPUT
    is_command = any(parameter.name == "offset" for parameter in function.parameters)
    return is_command and not reads and not function.name.startswith(HARMLESS)


def returned(function: Function, header: Header) -> Returns:
    """The kind of the value that a call returns."""
    if function.returns == "char *":
        return Returns.OWNED_TEXT
    if function.returns == "const char *":
        return Returns.TEXT
    if function.returns in (
        "uint64_t",
        "uintptr_t",
        "size_t",
        "unsigned long",
        "unsigned long long",
    ):
        return Returns.UNSIGNED
    if function.returns == "bool" or (function.returns == "int" and is_question(function, header)):
        return Returns.TRUTH
    if function.returns == "int" and not is_measure(function.name):
        return Returns.NOTHING
    return Returns.NUMBER


def is_question(function: Function, header: Header) -> bool:
    """Whether the int that a call returns is a truth value."""
    name = function.name
    if name in GRANTED or name == "aio_command_completed":
        return True
    if name.startswith(("is_", "can_", "supports_", "aio_is_")):
        return True
    return name.startswith("get_") and (name.endswith("_negotiated") or is_switch(name, header))


def is_switch(getter: str, header: Header) -> bool:
    """Whether the setter that belongs to a getter takes one bool."""
    setter = "set_" + getter[len("get_") :]
    return any(
        f.name == setter and [p.kind for p in f.parameters] == [Kind.BOOL] for f in header.functions
    )


def is_measure(name: str) -> bool:
    """Whether the int that a call returns is a number, not just 0 for success."""
    return name in COUNTED or name.startswith(("get_", "aio_get_", "aio_in_", "poll"))


def has_default(function: Function, parameter: Parameter) -> bool:
    """Whether a parameter is optional in Python: some callbacks, and the flags of a command."""
    if parameter.kind is Kind.CLOSURE:
        return parameter.optional
    is_flags = (parameter.name, parameter.ctype) == ("flags", "uint32_t")
    return (
        is_flags and parameter is function.parameters[-1] and not function.name.startswith("set_")
    )


class Documentation(NamedTuple):
    """The entry of a call in docs/*.txt.  `group` is the title of the file."""

    group: str
    since: str
    text: str


ENTRY = re.compile(r"^== (?P<name>\w+) \((?P<since>[\d.]+)\)$", re.MULTILINE)


def parse_documentation(text: str) -> Iterator[tuple[str, Documentation]]:
    """The entries of one file.  Its first line is the title; an entry begins `== name (since)`."""
    title, _, body = text.partition("\n")
    starts = list(ENTRY.finditer(body))
    ends = [match.start() for match in starts[1:]] + [len(body)]
    for match, end in zip(starts, ends):
        entry = body[match.end() : end].strip("\n")
        yield match["name"], Documentation(title.strip(), match["since"], entry)


def load_documentation(folder: Path = DOCS) -> dict[str, Documentation]:
    """The entries of all files.  Their order is that in which a program uses the calls."""
    found: dict[str, Documentation] = {}
    for path in sorted(folder.glob("*.txt")):
        found.update(parse_documentation(path.read_text(encoding="utf-8")))
    return found


def in_order_of_use(
    header: Header, documentation: Mapping[str, Documentation]
) -> list[tuple[str, list[Function]]]:
    """The calls by group, in the order of the documentation; calls without an entry come last."""
    places = {name: place for place, name in enumerate(documentation)}
    unknown = len(places)
    groups: dict[str, list[Function]] = {}
    for function in sorted(header.functions, key=lambda f: places.get(f.name, unknown)):
        entry = documentation.get(function.name)
        groups.setdefault(entry.group if entry else "Other calls", []).append(function)
    return list(groups.items())
