"""A proxy that cuts connections: after any number of bytes, one of them now, or all.

`python -m support.cutting JSON` runs one that cuts a connection every few milliseconds, in a
process of its own; Cutter is for tests.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Union

from support.volatile import interpreter

Address = Union[str, int]  # the path of a Unix socket, or a port on 127.0.0.1

CHUNK = 64 << 10


def no_limit() -> int | None:
    """Cut no connection because of the bytes that it has moved."""
    return None


def random_limits(rng: random.Random, most: int, times: int) -> Callable[[], int | None]:
    """Return a function that draws after how many bytes a connection is cut.

    Args:
        rng: What it draws from; small numbers, in the middle of a handshake, are as likely as
            large ones.
        most: The largest.
        times: How many connections are cut; those that follow are not.
    """
    limits = [int(most ** rng.random()) for _ in range(times)]

    def limit() -> int | None:
        return limits.pop() if limits else None

    return limit


class Pair:
    """A connection of a client, and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket, limit: int | None) -> None:
        self._client = client
        self._server = server
        self._limit = limit
        self._lock = threading.Lock()
        self.is_cut = False
        self.threads = [
            threading.Thread(target=self._pump, args=ends, daemon=True)
            for ends in ((client, server), (server, client))
        ]
        for thread in self.threads:
            thread.start()

    def cut(self, abort: bool = False) -> None:
        """End both connections, the one to the server first.

        A client that connects again comes after what it has sent before.

        Args:
            abort: Reset a TCP connection, instead of ending it in an orderly way.
        """
        with self._lock:
            if self.is_cut:
                return
            self.is_cut = True
            for sock in (self._server, self._client):
                with suppress(OSError):
                    if abort and sock.family == socket.AF_INET:
                        sock.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    sock.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while not self.is_cut:
                received = source.recv(CHUNK)
                if not received:
                    break
                target.sendall(received[: self._allowed(len(received))])
                if self._limit == 0:
                    break
        self.cut()

    def _allowed(self, count: int) -> int:
        """Return how many bytes may still pass, of both directions together."""
        with self._lock:
            if self._limit is None:
                return count
            allowed = min(count, self._limit)
            self._limit -= allowed
            return allowed

    def close(self) -> None:
        """Close the sockets."""
        self.cut()
        for thread in self.threads:
            thread.join()
        self._client.close()
        self._server.close()


class Cutter:
    """A proxy in front of a server.

    Attributes:
        address: Where it listens.
        uri: The same as a URI.
    """

    def __init__(
        self, server: Address, address: Address, limit: Callable[[], int | None] = no_limit
    ) -> None:
        """Listen.

        Args:
            server: Where the server listens.
            address: Where to listen: a path, or 0 for a port of the kernel.
            limit: Called for each connection: after how many bytes it is cut, or None.
        """
        self._to = server
        self._limit = limit
        self._pairs: list[Pair] = []
        self._closed = False
        if isinstance(address, str):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(address)
            self.address: Address = address
            self.uri = f"nbd+unix:///?socket={address}"
        else:
            self._listener = socket.create_server(("127.0.0.1", address))
            self.address = self._listener.getsockname()[1]
            self.uri = f"nbd://127.0.0.1:{self.address}"
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> list[Pair]:
        """The connections that were not cut, and whose ends have not ended."""
        return [pair for pair in self._pairs[:] if not pair.is_cut]

    @property
    def made(self) -> int:
        """How many connections were made so far."""
        return len(self._pairs)

    def cut(self, abort: bool = False) -> None:
        """Cut all connections; new ones are accepted."""
        for pair in self.alive:
            pair.cut(abort)

    def cut_one(self, rng: random.Random) -> None:
        """Cut one connection, if there is one."""
        alive = self.alive
        if alive:
            rng.choice(alive).cut(rng.random() < 0.5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._closed:
                client.close()
                return
            try:
                server = connected(self._to)
            except OSError:  # the server is dead at the moment
                client.close()
                continue
            for pair in self._pairs:
                if pair.is_cut:
                    pair.close()
            self._pairs.append(Pair(client, server, self._limit()))

    def close(self) -> None:
        """Cut everything, and listen no more."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for pair in self._pairs:
            pair.close()

    def __enter__(self) -> Cutter:
        """Return the proxy, which is listening."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close it."""
        self.close()


def connected(address: Address) -> socket.socket:
    """Return a socket that is connected to an address."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(("127.0.0.1", address))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@contextmanager
def cutting_process(server: Address, address: str, pause: float) -> Iterator[str]:
    """Run a proxy that cuts one connection every `pause` seconds; yields its URI."""
    tests = str(Path(__file__).resolve().parent.parent)
    arguments = json.dumps([server, address, pause])
    with subprocess.Popen(
        [interpreter(), "-S", "-m", "support.cutting", arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": tests},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield f"nbd+unix:///?socket={address}"
        finally:
            process.kill()


def main() -> None:
    """Cut one connection after the other until standard input ends."""
    server, address, pause = json.loads(sys.argv[1])
    ended = threading.Event()

    def end_with_parent() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=end_with_parent, daemon=True).start()
    rng = random.Random(0)
    with Cutter(server, address) as proxy:
        print("ready", flush=True)
        while not ended.wait(pause if pause else None):
            proxy.cut_one(rng)


if __name__ == "__main__":
    main()
