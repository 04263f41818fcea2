"""A server with a volatile cache, in a process that can be killed; a proxy that cuts connections.

What was written is in the memory of the server until a flush, or FUA, writes it to a file. When the
server is killed, it loses the rest, even if it had acknowledged it; or all but some random writes,
since a cache may write back whenever it likes.
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
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from support.hostile import (
    CMD_FLUSH,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXPORT_FLAGS,
    FLAG_CAN_MULTI_CONN,
    INFO_BLOCK_SIZE,
    DiskServer,
    Request,
    Wire,
)

FUA = 1
FLAGS = EXPORT_FLAGS | FLAG_CAN_MULTI_CONN
KIB = 1024


class _Server(DiskServer):
    """What runs in the process of a VolatileServer."""

    def __init__(self, folder: str, options: dict[str, int]) -> None:
        size, minimum = options["size"], options["minimum"]
        self._random = random.Random(options["seed"]) if options["seed"] else None
        self._changes = threading.Lock()
        self._dirty: list[tuple[int, int]] = []
        self._file = os.open(f"{folder}/image", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._file, size)
        super().__init__(Path(folder), size, options["flags"])
        self._listener.close()
        os.unlink(self.socket)
        self.memory[:] = os.pread(self._file, size, 0)
        if minimum > 1:
            sizes = struct.pack(">HIII", INFO_BLOCK_SIZE, minimum, max(minimum, 4 * KIB), 64 * KIB)
            self._more_info = [sizes]

    def listen(self, listener: socket.socket) -> None:
        """Accept connections, until the process is killed."""
        self._listener = listener
        listener.listen(64)
        print("ready", flush=True)
        self._accept()

    def _answer(self, wire: Wire, request: Request) -> None:
        if request.command not in (CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM, CMD_FLUSH):
            super()._answer(wire, request)
            return
        payload = wire.receive(request.count) if request.command == CMD_WRITE else b""
        with self._changes:
            self._change(request, payload)
        wire.simple(request.cookie)

    def _change(self, request: Request, payload: bytes) -> None:
        start, stop = request.offset, request.offset + request.count
        if request.command == CMD_FLUSH:
            for dirty in self._dirty:
                self._write_back(*dirty)
            self._dirty.clear()
            return
        self.memory[start:stop] = payload or bytes(request.count)
        if request.flags & FUA or (self._random and self._random.random() < 0.3):
            self._write_back(start, stop)
        else:
            self._dirty.append((start, stop))

    def _write_back(self, start: int, stop: int) -> None:
        os.pwrite(self._file, self.memory[start:stop], start)


class VolatileServer:
    """A server with a volatile cache that can be killed, and started again with the same socket.

    Attributes:
        uri: The URI of the server.
        lives: How often it was started.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        minimum: int = 1,
        seed: int = 0,
        flags: int = FLAGS,
        is_tcp: bool = False,
    ) -> None:
        """Start a server.

        Args:
            folder: An empty, short folder for its file and its socket.
            size: The size of the disk in bytes.
            minimum: The minimum block size.
            seed: If not 0, some of the writes that were not flushed survive, by chance.
            flags: The transmission flags.
            is_tcp: Whether it listens on a TCP port instead of a Unix socket.
        """
        self._folder = folder
        self._options = {"size": size, "minimum": minimum, "seed": seed, "flags": flags}
        self._process: subprocess.Popen[str] | None = None
        self.lives = 0
        self.address: str | tuple[str, int] = f"{folder}/volatile"
        self.uri = f"nbd+unix:///?socket={quote(str(self.address))}"
        if is_tcp:
            with socket.create_server(("127.0.0.1", 0)) as reserved:
                self.address = reserved.getsockname()[:2]
            self.uri = f"nbd://127.0.0.1:{self.address[1]}"
        self.start()

    def start(self, size: int | None = None) -> None:
        """Start it again, perhaps with another size."""
        if size is not None:
            self._options["size"] = size
        self.lives += 1
        if self._options["seed"]:
            self._options["seed"] += 1
        where = json.dumps([str(self._folder), self.address, self._options])
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, str(Path(__file__).parent.parent), where],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        self._process = None

    def contents(self) -> bytes:
        """Return what is on stable storage."""
        return Path(self._folder, "image").read_bytes()

    def fill(self, contents: bytes) -> None:
        """Give it other contents, by starting it again."""
        self.kill()
        Path(self._folder, "image").write_bytes(contents)
        self.start()

    def __enter__(self) -> VolatileServer:
        """Return the server, which is listening."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Kill the server."""
        self.kill()


_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from support.volatile import serve
serve(sys.argv[2])
"""


def serve(where: str) -> None:
    """Run a server; called in its process."""
    folder, address, options = json.loads(where)
    is_tcp = not isinstance(address, str)
    listener = socket.socket(socket.AF_INET if is_tcp else socket.AF_UNIX)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if not is_tcp:
        with suppress(FileNotFoundError):
            os.unlink(address)
    listener.bind(tuple(address) if is_tcp else address)
    _Server(folder, options).listen(listener)


class CuttingProxy:
    """Forwards connections to a server, and cuts each one after a random number of bytes.

    When it cuts one, it first lets the server finish what it has received, as nothing in NBD tells
    a client when a lost command is over.

    Attributes:
        uri: The URI of the proxy.
        cuts: How many connections were cut.
    """

    def __init__(
        self, server: VolatileServer, folder: Path, seed: int, longest: int, is_tcp: bool = False
    ) -> None:
        """Listen; each connection is cut after at most `longest` bytes in one direction."""
        self._server = server
        self._random = random.Random(seed)
        self._longest = longest
        self._is_open = True
        self.cuts = 0
        if is_tcp:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.uri = f"nbd://127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"{folder}/proxy")
            self._listener.listen(64)
            self.uri = f"nbd+unix:///?socket={quote(str(folder))}/proxy"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []

    def stop_cutting(self) -> None:
        """Cut no further connection."""
        self._longest = 1 << 60

    def cut_one(self) -> None:
        """Cut one of the connections."""
        pairs = list(self._pairs)
        if pairs:
            self._cut(*self._random.choice(pairs))

    def __enter__(self) -> CuttingProxy:
        """Return the proxy, which is listening."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the proxy."""
        self._is_open = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in list(self._pairs):
            self._cut(*pair)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while self._is_open:
                client, _ = self._listener.accept()
                address = self._server.address
                server = socket.socket(
                    socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
                )
                try:
                    server.connect(address)
                except OSError:
                    server.close()
                    client.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(client, server), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        pair = client, server
        self._pairs.append(pair)
        back = threading.Thread(target=self._forward, args=(server, client, client), daemon=True)
        back.start()
        self._forward(client, server, client)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)
        back.join()
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        self._pairs.remove(pair)
        client.close()
        server.close()

    def _forward(self, source: socket.socket, sink: socket.socket, client: socket.socket) -> None:
        """Forward bytes until the source ends; behind the cut, only read them."""
        left = self._random.randrange(1, self._longest)
        with suppress(OSError):
            while True:
                data = source.recv(64 * KIB)
                if not data:
                    return
                if len(data) > left:
                    sink.sendall(data[:left])
                    self.cuts += 1
                    if source is client:
                        return
                    with suppress(OSError):
                        client.shutdown(socket.SHUT_RD)  # ends the other direction
                    while source.recv(64 * KIB):
                        pass
                    return
                left -= len(data)
                sink.sendall(data)

    def _cut(self, client: socket.socket, server: socket.socket) -> None:
        """End the client's direction; `_serve` does the rest."""
        self.cuts += 1
        with suppress(OSError):
            client.shutdown(socket.SHUT_RD)
