"""An NBD server with a volatile cache: killed, it loses what was not flushed.

The server is a process of its own, so that SIGKILL ends it as it ends a real one: sockets are
closed in the middle of anything, and nothing is put on the disk any more.  Its disk is a file.
What is written stays in the memory of the process until a flush, or a write with FUA, puts it into
the file.  Started again, the server has what is in the file.  A server with `writes_back` puts
random sectors into the file before that, as a real cache does whenever it likes.

`python -m support.volatile JSON` runs the server; VolatileServer is for tests.
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Callable

from support import hostile
from support.hostile import HungUp, Request, Wire

SECTOR = 512
BASE_ALLOCATION = 7  # the number of the metadata context
STATUS_BLOCK = 4096
HOLE_OF_ZEROES = 3
READ_ONLY, SEND_FLUSH = 0x02, 0x04
COMMAND_FUA = 1
ADDRESS_IN_USE = 98
START = 30  # seconds until a server that is started has to be ready
POLLRDHUP = getattr(select, "POLLRDHUP", 0x2000)  # PyPy lacks the name


@dataclass
class Options:
    """What a server is like.

    Attributes:
        path: The file with the disk.
        address: The path of a Unix socket, or a port on 127.0.0.1; 0 is one of the kernel's.
        flags: The transmission flags.
        name: The name of the only export.
        blocks: The minimum, preferred and maximum block size, or nothing.
        structured: Whether it knows structured replies and base:allocation.
        shuffles: Whether it carries out commands in random order.
        delay: The longest pause before it carries out a command, in seconds.
        writes_back: The chance that a command writes some of the cache into the file.
        seed: Of all that is random.
        dies: Where it kills itself: "greet", "option", "go", or a command of hostile.COMMANDS; with
            "+", such as "flush+", after it has carried out the command, and before its reply.
        after: How many of these it survives.
    """

    path: str
    address: str | int
    flags: int = hostile.EXPORT_FLAGS | hostile.FLAG_CAN_MULTI_CONN
    name: str = ""
    blocks: tuple[int, ...] = ()
    structured: bool = True
    shuffles: bool = False
    delay: float = 0.0
    writes_back: float = 0.0
    seed: int = 0
    dies: str = ""
    after: int = 0


# --- the process --------------------------------------------------------------------------------


class Disk:
    """A file, and a cache of it that is lost with the process."""

    def __init__(self, options: Options) -> None:
        self._file = os.open(options.path, os.O_RDWR)
        self.memory = bytearray(Path(options.path).read_bytes())
        self._dirty: set[int] = set()
        self._writes_back = options.writes_back
        self._rng = random.Random(options.seed)

    def write(self, data: bytes, offset: int, fua: bool) -> None:
        """Change the cache, and the file as well with fua."""
        self.memory[offset : offset + len(data)] = data
        touched = range(offset // SECTOR, -(-(offset + len(data)) // SECTOR))
        self._dirty.update(touched)
        if fua:
            self._put(sorted(touched))
        elif self._rng.random() < self._writes_back:
            dirty = sorted(self._dirty)
            self._put(sorted(self._rng.sample(dirty, self._rng.randint(0, len(dirty)))))

    def flush(self) -> None:
        """Put everything into the file."""
        self._put(sorted(self._dirty))

    def _put(self, sectors: Sequence[int]) -> None:
        index = 0
        while index < len(sectors):
            end = index + 1
            while end < len(sectors) and sectors[end] == sectors[end - 1] + 1:
                end += 1
            start = sectors[index] * SECTOR
            os.pwrite(self._file, self.memory[start : (sectors[end - 1] + 1) * SECTOR], start)
            index = end
        self._dirty.difference_update(sectors)

    def status(self, offset: int, count: int, once: bool) -> list[int]:
        """Return lengths and flags of extents, at least one."""
        entries: list[int] = []
        end = offset + count
        while offset < end and not (once and len(entries) > 2):
            stop = min(end, (offset // STATUS_BLOCK + 1) * STATUS_BLOCK)
            flags = 0 if any(self.memory[offset:stop]) else HOLE_OF_ZEROES
            if entries and entries[-1] == flags:
                entries[-2] += stop - offset
            else:
                entries += [stop - offset, flags]
            offset = stop
        return entries[:2] if once else entries


class Refused(Exception):
    """A command that is answered by an errno."""


class Process:
    """The server's process: accepts connections, and serves each in a thread."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._disk = Disk(options)
        self._lock = threading.Lock()
        self._rng = random.Random(options.seed)
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._left = options.after + 1

    def serve(self) -> None:
        """Listen, tell the parent the port, and serve for ever."""
        address = self._options.address
        if isinstance(address, str):
            with suppress(FileNotFoundError):
                os.unlink(address)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
        else:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind(listener, address)
        listener.listen(64)
        print(0 if isinstance(address, str) else listener.getsockname()[1], flush=True)
        while True:
            sock, _ = listener.accept()
            self._finish_the_dead()
            thread = threading.Thread(target=self._run, args=(sock,), daemon=True)
            self._connections[sock] = thread
            thread.start()

    def _finish_the_dead(self) -> None:
        """Wait until what clients have sent that are gone is carried out.

        Otherwise an old write could overtake the same client's new one.
        """
        for sock, thread in list(self._connections.items()):
            poll = select.poll()
            poll.register(sock, POLLRDHUP)
            if not thread.is_alive() or poll.poll(0):
                thread.join()
                del self._connections[sock]
                sock.close()

    def _passes(self, place: str) -> None:
        """Die if this is the place."""
        if place == self._options.dies:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _run(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(sock)
        with suppress(HungUp):
            self._greet(wire)
            self._answer_all(wire)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _greet(self, wire: Wire) -> None:
        self._passes("greet")
        wire.greet()
        while True:
            option = wire.option()
            self._passes("option")
            if option.code == hostile.OPT_STRUCTURED_REPLY and self._options.structured:
                wire.structured = True
                wire.answer(option.code, hostile.REP_ACK)
            elif option.code == hostile.OPT_SET_META and wire.structured:
                if b"base:allocation" in option.payload:
                    number = struct.pack(">I", BASE_ALLOCATION)
                    wire.answer(option.code, hostile.REP_META_CONTEXT, number + b"base:allocation")
                wire.answer(option.code, hostile.REP_ACK)
            elif option.code in (hostile.OPT_GO, hostile.OPT_INFO):
                if self._gone(wire, option):
                    return
            elif option.code == hostile.OPT_ABORT:
                wire.answer(option.code, hostile.REP_ACK)
                raise HungUp
            else:
                wire.answer(option.code, hostile.REP_ERR_UNSUP)

    def _gone(self, wire: Wire, option: hostile.Option) -> bool:
        """Describe the export; returns whether the client's commands begin now."""
        (length,) = struct.unpack_from(">I", option.payload)
        if option.payload[4 : 4 + length] != self._options.name.encode():
            wire.answer(option.code, hostile.REP_ERR_UNKNOWN, b"no such export")
            return False
        size = len(self._disk.memory)
        wire.answer(option.code, hostile.REP_INFO, hostile.export_info(size, self._options.flags))
        if self._options.blocks:
            sizes = struct.pack(">HIII", hostile.INFO_BLOCK_SIZE, *self._options.blocks)
            wire.answer(option.code, hostile.REP_INFO, sizes)
        self._passes("go")
        wire.answer(option.code, hostile.REP_ACK)
        return option.code == hostile.OPT_GO

    def _answer_all(self, wire: Wire) -> None:
        """Answer commands: in their order, or a random one of those that have arrived."""
        waiting: list[tuple[Request, bytes]] = []
        while True:
            while not waiting or (self._options.shuffles and len(waiting) < 32 and more(wire.sock)):
                request = wire.any_request()
                if request.command == hostile.CMD_DISC:
                    self._passes("disconnect")
                    raise HungUp
                is_write = request.command == hostile.CMD_WRITE
                waiting.append((request, wire.receive(request.count) if is_write else b""))
            index = self._rng.randrange(len(waiting)) if self._options.shuffles else 0
            self._answer(wire, *waiting.pop(index))

    def _answer(self, wire: Wire, request: Request, data: bytes) -> None:
        if self._options.delay:
            time.sleep(self._rng.uniform(0, self._options.delay))
        name = hostile.COMMANDS[request.command]
        self._passes(name)
        try:
            with self._lock:
                kind, payload = self._carried_out(request, data)
        except Refused as reason:
            (number,) = reason.args
            if wire.structured:
                wire.chunk(request, hostile.CHUNK_ERROR, hostile.failure(number))
            else:
                wire.simple(request.cookie, number)
            return
        self._passes(f"{name}+")
        if wire.structured:
            wire.chunk(request, kind, payload)
        else:
            wire.simple(request.cookie, 0, payload[8:])

    def _carried_out(self, request: Request, data: bytes) -> tuple[int, bytes]:
        """Carry out a command; returns the kind and the payload of the reply's only chunk."""
        self._check(request)
        disk, offset, count = self._disk, request.offset, request.count
        fua = bool(request.flags & COMMAND_FUA)
        if request.command == hostile.CMD_READ:
            content = bytes(disk.memory[offset : offset + count])
            return hostile.CHUNK_OFFSET_DATA, hostile.data(offset, content)
        if request.command == hostile.CMD_BLOCK_STATUS:
            entries = disk.status(offset, count, bool(request.flags & 8))
            return hostile.CHUNK_BLOCK_STATUS, hostile.extents(BASE_ALLOCATION, *entries)
        if request.command == hostile.CMD_WRITE:
            disk.write(data, offset, fua)
        elif request.command in (hostile.CMD_TRIM, hostile.CMD_WRITE_ZEROES):
            disk.write(bytes(count), offset, fua)
        elif request.command == hostile.CMD_FLUSH:
            disk.flush()
        return hostile.CHUNK_NONE, b""

    def _check(self, request: Request) -> None:
        if request.command == hostile.CMD_FLUSH:
            return
        if request.offset + request.count > len(self._disk.memory):
            raise Refused(errno.EINVAL)
        if self._options.blocks:
            minimum, _, maximum = self._options.blocks
            moves = request.command in (hostile.CMD_READ, hostile.CMD_WRITE)
            if (request.offset | request.count) % minimum or (moves and request.count > maximum):
                raise Refused(errno.EINVAL)
        changes = (hostile.CMD_WRITE, hostile.CMD_TRIM, hostile.CMD_WRITE_ZEROES)
        if request.command in changes and self._options.flags & READ_ONLY:
            raise Refused(errno.EPERM)


def bind(listener: socket.socket, port: int) -> None:
    """Bind to a port, which something else may have for a moment."""
    end = time.monotonic() + START
    while True:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != ADDRESS_IN_USE or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def more(sock: socket.socket) -> bool:
    """Return whether something has arrived that was not received yet."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def end_with_parent() -> None:
    """End this process when the parent, which has the other end of the pipe, has ended."""
    sys.stdin.read()
    os._exit(0)


# --- for tests ----------------------------------------------------------------------------------


def interpreter() -> str:
    """Return the interpreter for a server: PyPy would take ten times as long to start it."""
    is_slow = sys.implementation.name != "cpython"
    return (shutil.which("python3") if is_slow else None) or sys.executable


class VolatileServer:
    """A server with a volatile cache, in a process of its own.

    Attributes:
        uri: Its URI, which stays the same.
        kills: How often it was killed.
        options: What it is like from the next start on.
    """

    def __init__(
        self,
        folder: Path,
        size: int = hostile.SIZE,
        tcp: bool = False,
        **options: object,
    ) -> None:
        """Start it.

        Args:
            folder: A folder of its own with a short path.
            size: The size of the disk, which is zero at first.
            tcp: Whether it listens on 127.0.0.1, and not on a Unix socket.
            options: Other fields of Options.
        """
        self._path = folder / "disk"
        self.resize(size)
        address = 0 if tcp else str(folder / "sock")
        self.options = Options(str(self._path), address, **options)  # type: ignore[arg-type]
        self.kills = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.uri = f"nbd+unix:///{self.options.name}?socket={self.options.address}"
        if tcp:
            self.uri = f"nbd://127.0.0.1:{self.options.address}/{self.options.name}"

    def resize(self, size: int) -> None:
        """Change the size of the disk, which is to be done while the server is not running."""
        with self._path.open("ab") as file:
            file.truncate(size)

    def start(self, **changes: object) -> None:
        """Start the server, and wait until it listens.

        Args:
            changes: Fields of Options that change.
        """
        for name, value in changes.items():
            setattr(self.options, name, value)
        tests = str(Path(__file__).resolve().parent.parent)
        self._process = subprocess.Popen(
            [interpreter(), "-S", "-m", "support.volatile", json.dumps(asdict(self.options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": tests},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip() not in (b"", b"0"):
            self.options.address = int(line)
        self.options.seed += 1  # so that it does something else next time

    def kill(self) -> None:
        """Kill the server (SIGKILL), and wait until it has ended."""
        process = self._process
        if process is None:
            return
        process.kill()
        self.wait()
        self.kills += 1

    def wait(self) -> None:
        """Wait until the server, which kills itself, has ended."""
        process = self._process
        if process is not None:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None

    def restart(self, **changes: object) -> None:
        """Kill it, and start it again; see start."""
        self.kill()
        self.start(**changes)

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended."""
        return self._process is not None and self._process.poll() is None

    def disk(self) -> bytes:
        """Return what is on stable storage."""
        return self._path.read_bytes()

    def fill(self, data: bytes) -> None:
        """Change the disk; only for a server that is not running or that nobody has written to."""
        self.kill()
        self._path.write_bytes(data)
        self.start()

    @contextmanager
    def killed_at_random(
        self, rng: random.Random, times: int, longest: float = 0.1
    ) -> Iterator[None]:
        """Kill and restart the server inside the block, up to `times` times.

        Args:
            rng: Draws the moments.
            times: How often.
            longest: The longest life in seconds, and half of the longest time that it is dead.
        """
        lives = [(rng.uniform(0, longest), rng.choice([0, longest / 2])) for _ in range(times)]

        def killing(done: threading.Event) -> None:
            for alive, dead in lives:
                if done.wait(alive):
                    return
                self.kill()
                time.sleep(dead)
                self.start()

        with _in_thread(killing):
            yield

    @contextmanager
    def restarted(self, *deaths: str, after: int = 0) -> Iterator[list[str]]:
        """Start the server again whenever it has killed itself inside the block.

        Args:
            deaths: Where the current server dies, and the next ones, which then live for ever.
            after: How many times it passes the first place before.

        Yields:
            The places where it has died.
        """
        died: list[str] = []
        self.restart(dies=deaths[0], after=after)

        def restarting(done: threading.Event) -> None:
            following = [*deaths[1:], ""]
            while following:
                while self.is_running:
                    if done.wait(0.001):
                        return
                self.wait()
                died.append(deaths[len(deaths) - len(following)])
                self.start(dies=following.pop(0), after=0)

        try:
            with _in_thread(restarting):
                yield died
        finally:
            self.options.dies = ""

    def close(self) -> None:
        """Kill the server if it is running."""
        self.kill()

    def __enter__(self) -> VolatileServer:
        """Return the running server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the server."""
        self.close()


@contextmanager
def volatile_server(**options: object) -> Iterator[VolatileServer]:
    """Run a VolatileServer in a folder of its own, which is removed afterwards."""
    from support.servers import short_folder  # needs pytest, which the server's process has not

    folder = short_folder()
    try:
        with VolatileServer(folder, **options) as server:  # type: ignore[arg-type]
            yield server
    finally:
        shutil.rmtree(folder)


@contextmanager
def _in_thread(call: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run a function in a thread; it returns when the event is set at the end of the block."""
    done = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call(done)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not failures, failures


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    Process(Options(**json.loads(sys.argv[1]))).serve()
