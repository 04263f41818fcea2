# SPDX-License-Identifier: LGPL-2.0-or-later
"""What C cannot say: what a return value means, which calls take no lock, and the documentation.

The tables hold what no rule can tell.  A call that they do not know is bound by the rules.
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
    """What a call gives back in Python."""

    NOTHING = "None"
    TRUTH = "bool"
    NUMBER = "int"
    UNSIGNED = "an int that is never a failure"
    TEXT = "str that libnbd keeps"
    OWNED_TEXT = "str that the caller frees"


#: Options of the handshake that the server grants or refuses, without that being a failure.
GRANTED = frozenset({"opt_starttls", "opt_extended_headers", "opt_structured_reply"})

#: Options of the handshake that return how many items their callback was given; those that do not
#: wait return 0.
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

#: Calls for which libnbd takes no lock: the ones that a callback may make on its own handle, unless
#: it is the debug callback, which every call calls.
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


#: How calls begin that only set or tell something: they leave the connection as it is.
STILL = ("set_", "get_", "is_", "can_", "add_", "clear_", "supports_", "aio_get_", "aio_is_")


def moves_connection(function: Function) -> bool:
    """Whether a call may send, receive or end the connection.

    A call that is taken for one that does costs a little time where it fails, and nothing else.
    """
    return function.name not in LOCK_FREE and not function.name.startswith(STILL)


def returned(function: Function, header: Header) -> Returns:
    """What the value that a call returns means."""
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
    """Whether an int is the answer to yes or no."""
    name = function.name
    if name in GRANTED or name == "aio_command_completed":
        return True
    if name.startswith(("is_", "can_", "supports_", "aio_is_")):
        return True
    return name.startswith("get_") and (name.endswith("_negotiated") or is_switch(name, header))


def is_switch(getter: str, header: Header) -> bool:
    """Whether the setter that goes with a getter takes one bool."""
    setter = "set_" + getter[len("get_") :]
    return any(
        f.name == setter and [p.kind for p in f.parameters] == [Kind.BOOL] for f in header.functions
    )


def is_measure(name: str) -> bool:
    """Whether an int is a number rather than the success of an action."""
    return name in COUNTED or name.startswith(("get_", "aio_get_", "aio_in_", "poll"))


def has_default(function: Function, parameter: Parameter) -> bool:
    """Whether a Python caller may leave a parameter out: optional callbacks, a command's flags."""
    if parameter.kind is Kind.CLOSURE:
        return parameter.optional
    is_flags = (parameter.name, parameter.ctype) == ("flags", "uint32_t")
    return (
        is_flags and parameter is function.parameters[-1] and not function.name.startswith("set_")
    )


class Documentation(NamedTuple):
    """What docs/*.txt says of a call."""

    group: str
    since: str
    text: str


ENTRY = re.compile(r"^== (?P<name>\w+) \((?P<since>[\d.]+)\)$", re.MULTILINE)


def parse_documentation(text: str) -> Iterator[tuple[str, Documentation]]:
    """The entries of one file: a title, then `== name (since)` and the text of each."""
    title, _, body = text.partition("\n")
    starts = list(ENTRY.finditer(body))
    ends = [match.start() for match in starts[1:]] + [len(body)]
    for match, end in zip(starts, ends):
        entry = body[match.end() : end].strip("\n")
        yield match["name"], Documentation(title.strip(), match["since"], entry)


def load_documentation(folder: Path = DOCS) -> dict[str, Documentation]:
    """Every entry, in the order in which a program uses the calls."""
    found: dict[str, Documentation] = {}
    for path in sorted(folder.glob("*.txt")):
        found.update(parse_documentation(path.read_text(encoding="utf-8")))
    return found


def in_order_of_use(
    header: Header, documentation: Mapping[str, Documentation]
) -> list[tuple[str, list[Function]]]:
    """The calls in the groups of the documentation; those it does not know come last."""
    places = {name: place for place, name in enumerate(documentation)}
    unknown = len(places)
    groups: dict[str, list[Function]] = {}
    for function in sorted(header.functions, key=lambda f: places.get(f.name, unknown)):
        entry = documentation.get(function.name)
        groups.setdefault(entry.group if entry else "Other calls", []).append(function)
    return list(groups.items())
