"""A server of the tests' own that can be killed, and starts again with what it had flushed."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from support.hostile import (
    CHUNK_ERROR,
    CMD_FLUSH,
    EXPORT_FLAGS,
    FLAG_CAN_MULTI_CONN,
    SIZE,
    DiskServer,
    HungUp,
    Request,
    Wire,
    export_info,
    failure,
)

ESHUTDOWN = 108  # NBD's own number, which is Linux's


class MortalServer(DiskServer):
    """A DiskServer with a volatile cache: `kill` loses what no flush has put on stable storage.

    Attributes:
        greeted: How many clients have connected.
        shuts_down: Whether it refuses commands because it is shutting down.
        drops: Whether it disconnects a client that sends a command.
    """

    shuts_down = drops = False

    def __init__(
        self,
        folder: Path,
        size: int = SIZE,
        flags: int = EXPORT_FLAGS | FLAG_CAN_MULTI_CONN,
        connections: int | None = None,
    ) -> None:
        """Listen in a folder; see DiskServer."""
        self._stable = bytearray()
        self._flags = flags
        self._dead: set[socket.socket] = set()
        self._life = threading.RLock()
        super().__init__(folder, size, flags, connections)
        self._stable[:] = self.memory

    @property
    def greeted(self) -> int:
        """How many clients have connected."""
        return len(self._wires)

    @property
    def stable(self) -> bytes:
        """What is on stable storage."""
        with self._life:
            return bytes(self._stable)

    def cut(self) -> None:
        """Cut all connections; the server lives on."""
        for sock in self._wires[:]:
            self._cut(sock)

    def cut_one(self, number: int) -> None:
        """Cut one of the connections that are alive."""
        alive = [sock for sock in self._wires[:] if sock not in self._dead]
        if alive:
            self._cut(alive[number % len(alive)])

    def refuse(self) -> None:
        """Accept no more connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with suppress(FileNotFoundError):
            os.unlink(self.socket)

    def _cut(self, sock: socket.socket) -> None:
        self._dead.add(sock)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Cut all connections, refuse new ones, and lose what was not flushed."""
        self.refuse()
        self.cut()
        self._stop_at = None
        self.resume()
        with self._life:
            self.memory[:] = self._stable

    def start(self, size: int | None = None, flags: int | None = None) -> None:
        """Listen again, perhaps with another disk."""
        if size is not None:
            self.memory = bytearray(size)
            self._stable = bytearray(size)
        self._info = export_info(len(self.memory), self._flags if flags is None else flags)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.socket)
        self._listener.listen(64)
        self._start(self._accept)

    def restart(self) -> None:
        """Kill the server, and start it again at once."""
        self.kill()
        self.start()

    def _answer(self, wire: Wire, request: Request) -> None:
        with self._life:
            if self.drops or wire.sock in self._dead:
                raise HungUp
            if self.shuts_down:
                wire.chunk(request, CHUNK_ERROR, failure(ESHUTDOWN))
                return
            if request.command == CMD_FLUSH:
                self._stable[:] = self.memory
            super()._answer(wire, request)
