"""nbdkit's log of the requests that a server gets."""

from __future__ import annotations

import re
from pathlib import Path

from support.servers import StartServer


class Logged:
    """A server with a log of its requests.

    Attributes:
        uri: The URI of the server.
        log: The file with the log.
    """

    def __init__(self, nbdkit: StartServer, log: Path, *arguments: str) -> None:
        """Start an nbdkit with these arguments: filters, a plugin and parameters."""
        self.log = log
        self.uri = nbdkit("--filter=log", "--threads=64", *arguments, f"logfile={log}").uri

    def lines(self, what: str) -> list[str]:
        """Return the lines of the log at the start of each request."""
        text = self.log.read_text()
        return [line for line in text.splitlines() if re.search(rf" {what} id=\d+ ", line)]

    def reads(self) -> list[tuple[int, int]]:
        """Return the offset and the size of each read."""
        found = (re.search(r"offset=(\w+) count=(\w+)", line) for line in self.lines("Read"))
        return [(int(one[1], 16), int(one[2], 16)) for one in found if one]

    def fetched(self) -> int:
        """Return how many bytes were read in all."""
        return sum(count for _, count in self.reads())

    def max_at_once(self) -> int:
        """Return the maximum number of concurrent reads."""
        now = most = 0
        for line in self.log.read_text().splitlines():
            now += 1 if " Read id=" in line else -1 if "...Read id=" in line else 0
            most = max(most, now)
        return most
