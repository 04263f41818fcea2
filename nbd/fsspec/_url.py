# SPDX-License-Identifier: LGPL-2.0-or-later
"""The parts of the URI of an export."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote, unquote

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")


class Url(NamedTuple):
    """A URI, split and not decoded.

    Attributes:
        scheme: One of SCHEMES.
        authority: The host and port of TCP; empty for a Unix socket.
        name: The export name, percent-encoded; empty for the server's default export.
        query: The parameters, such as socket=PATH.
    """

    scheme: str
    authority: str
    name: str
    query: str

    def __str__(self) -> str:
        question = "?" if self.query else ""
        return f"{self.scheme}://{self.authority}/{self.name}{question}{self.query}"

    @property
    def is_server(self) -> bool:
        """Whether it names a server, and no export."""
        return not self.name

    @property
    def server(self) -> Url:
        """The URI of the server."""
        return self._replace(name="")

    @property
    def export_name(self) -> str:
        """The export name, decoded."""
        return unquote(self.name, errors="surrogateescape")

    def export(self, name: str) -> Url:
        """Return the URI of another export of the same server."""
        return self._replace(name=quote(name, safe="", errors="surrogateescape"))


def split(url: str) -> Url:
    """Split a URI at the places where libnbd does."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, name = rest.partition("/")
    return Url(scheme, authority, name, query)
