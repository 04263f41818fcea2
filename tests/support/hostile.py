"""A scripted NBD server, for tests of the client against a server that misbehaves.

A script is a function of a Wire, which is the server's end of a connection. It runs in a thread and
may send anything: the methods of Wire follow the protocol only as far as the script asks for it.
When a script returns, the connection is closed. This module uses nothing but the standard library,
so that it shares no misunderstanding of the protocol with the client.
"""

from __future__ import annotations

import faulthandler
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SIZE = 1 << 20
BLOCK = 512

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
CLISERV_MAGIC = bytes.fromhex("00420281861253")
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META, OPT_SET_META, OPT_EXTENDED_HEADERS = 8, 9, 10, 11

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_TLS_REQD = REP_ERROR + 1, REP_ERROR + 2, REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

# HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, SEND_CACHE
EXPORT_FLAGS = 0x01 | 0x04 | 0x08 | 0x20 | 0x40 | 0x80 | 0x400
FLAG_CAN_MULTI_CONN = 0x100

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_BLOCK_STATUS = 0, 1, 2, 3, 4, 7
CMD_CACHE, CMD_WRITE_ZEROES = 5, 6

CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_BLOCK_STATUS_EXT = 6
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2
CHUNK_DONE = 1

BOUND = 10.0  # seconds until the watchdog disconnects a client that still waits
FATAL = 60.0  # further seconds until a client that still waits is killed


class HungUp(Exception):
    """The client closed the connection; this ends a script that waits for more from it."""


@dataclass(frozen=True)
class Option:
    """An option that the client sent during the handshake."""

    code: int
    payload: bytes


@dataclass(frozen=True)
class Request:
    """A request that the client sent after the handshake."""

    flags: int
    command: int
    cookie: int
    offset: int
    count: int


class Wire:
    """The server's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        """Speak over a connected socket."""
        self.sock = sock
        self.extended = False
        self.structured = False

    def send(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        try:
            self.sock.sendall(b"".join(parts))
        except OSError as error:
            raise HungUp from error

    def receive(self, count: int) -> bytes:
        """Receive exactly this many bytes."""
        received = bytearray()
        while len(received) < count:
            try:
                part = self.sock.recv(count - len(received))
            except OSError as error:
                raise HungUp from error
            if not part:
                raise HungUp
            received += part
        return bytes(received)

    def linger(self) -> None:
        """Send nothing and stay connected until the client or the watchdog disconnects."""
        while True:
            self.receive(1)

    def greet(self, flags: int = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) -> None:
        """Open a newstyle handshake and take the client's flags."""
        self.send(NBDMAGIC, IHAVEOPT, struct.pack(">H", flags))
        self.receive(4)

    def option(self) -> Option:
        """Receive the client's next option."""
        magic, code, length = struct.unpack(">8sII", self.receive(16))
        assert magic == IHAVEOPT, magic
        return Option(code, self.receive(length))

    def wait_for(self, code: int) -> Option:
        """Refuse options until the one with this code arrives."""
        while True:
            option = self.option()
            if option.code == code:
                return option
            self.answer(option.code, REP_ERR_UNSUP)

    def answer(
        self,
        code: int,
        kind: int,
        payload: bytes = b"",
        *,
        magic: int = OPTION_REPLY_MAGIC,
        length: int | None = None,
    ) -> None:
        """Send a reply to an option; pass length to claim a wrong one in the header."""
        claimed = len(payload) if length is None else length
        self.send(struct.pack(">QIII", magic, code, kind, claimed), payload)

    def negotiate(
        self,
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: Sequence[tuple[int, bytes]] = (),
        info: Sequence[bytes] | None = None,
    ) -> None:
        """Complete a handshake as a correct server does.

        Args:
            structured: Agree to structured replies.
            extended: Agree to extended headers.
            contexts: Numbers and names of the contexts to select, requested or not.
            info: The information items about the export, instead of its size and flags.
        """
        self.greet()
        agreed = {OPT_STRUCTURED_REPLY: structured, OPT_EXTENDED_HEADERS: extended}
        while True:
            option = self.option()
            if option.code == OPT_GO:
                break
            if option.code == OPT_SET_META and contexts:
                for number, name in contexts:
                    self.answer(option.code, REP_META_CONTEXT, struct.pack(">I", number) + name)
                self.answer(option.code, REP_ACK)
            elif agreed.get(option.code, False):
                self.extended |= option.code == OPT_EXTENDED_HEADERS
                self.structured |= option.code == OPT_STRUCTURED_REPLY
                self.answer(option.code, REP_ACK)
            else:
                self.answer(option.code, REP_ERR_UNSUP)
        self.go(info)

    def go(self, info: Sequence[bytes] | None = None) -> None:
        """Grant the client's request to go."""
        for item in [export_info()] if info is None else info:
            self.answer(OPT_GO, REP_INFO, item)
        self.answer(OPT_GO, REP_ACK)

    def request(self) -> Request:
        """Receive the client's next request; the payload of a write is not received."""
        request = self.any_request()
        if request.command == CMD_DISC:
            raise HungUp
        return request

    def any_request(self) -> Request:
        """Receive the client's next request, which may be a disconnect."""
        wanted, layout = REQUEST_MAGIC, ">IHHQQI"
        if self.extended:
            wanted, layout = EXTENDED_REQUEST_MAGIC, ">IHHQQQ"
        magic, *fields = struct.unpack(layout, self.receive(struct.calcsize(layout)))
        assert magic == wanted, hex(magic)
        return Request(*fields)

    def simple(self, cookie: int, error: int = 0, payload: bytes = b"") -> None:
        """Send a simple reply."""
        self.send(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, cookie), payload)

    def chunk(
        self,
        request: Request,
        kind: int,
        payload: bytes = b"",
        *,
        done: bool = True,
        cookie: int | None = None,
        length: int | None = None,
    ) -> None:
        """Send a chunk of a structured reply; pass cookie or length to send a wrong one."""
        flags = CHUNK_DONE if done else 0
        number = request.cookie if cookie is None else cookie
        claimed = len(payload) if length is None else length
        if self.extended:
            head = EXTENDED_REPLY_MAGIC, flags, kind, number, request.offset
            self.send(struct.pack(">IHHQQQ", *head, claimed), payload)
        else:
            self.send(
                struct.pack(">IHHQI", STRUCTURED_REPLY_MAGIC, flags, kind, number, claimed), payload
            )


Script = Callable[[Wire], None]


class Watchdog:
    """A time limit for a block: when it expires, `bark` is called to wake the client.

    If the client does not wake up even then, the whole process is ended with a traceback.
    """

    def __init__(self, seconds: float, bark: Callable[[], object]) -> None:
        """Call bark after this many seconds."""
        self.late = False
        self._bark = bark
        self._seconds = seconds
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def _expire(self) -> None:
        self.late = True
        self._bark()

    def __enter__(self) -> Watchdog:
        """Start the timer."""
        faulthandler.dump_traceback_later(self._seconds + FATAL, exit=True)
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the timer."""
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()


class Connection:
    """A script that runs in a thread, and the socket to which its client connects.

    A watchdog closes the connection after some time, so that no client waits for ever. If it has
    to, that is an error, unless the script is silent on purpose.
    """

    def __init__(self, script: Script, bound: float = BOUND, silent: bool = False) -> None:
        """Prepare to run a script.

        Args:
            script: What the server does.
            bound: How many seconds the client may take.
            silent: Whether the client is expected to wait until the watchdog disconnects it.
        """
        self._script = script
        self._silent = silent
        self._server, self.client = socket.socketpair()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._outcome: Future[None] = Future()
        self._watchdog = Watchdog(bound, self._hang_up)

    def fileno(self) -> int:
        """Return the client's socket, which the caller owns from now on."""
        return self.client.detach()

    def _run(self) -> None:
        try:
            with suppress(HungUp):
                self._script(Wire(self._server))
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Connection:
        """Start the script and the watchdog."""
        self._outcome = self._pool.submit(self._run)
        self._watchdog.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the script; fail if the script failed, or if its client did not return in time."""
        self._hang_up()
        self._pool.shutdown()
        self._watchdog.__exit__(kind, error, traceback)
        self._server.close()
        self.client.close()
        self._outcome.result()
        late = self._watchdog.late
        assert late == self._silent, f"the watchdog had to hang up on the client: {late}"


def export_info(size: int = SIZE, flags: int = EXPORT_FLAGS) -> bytes:
    """Return the item of a reply to GO with the export's size and flags."""
    return struct.pack(">HQH", INFO_EXPORT, size, flags)


def counted(text: bytes) -> bytes:
    """Return text preceded by its length, the format of names in the handshake."""
    return struct.pack(">I", len(text)) + text


def data(offset: int, content: bytes) -> bytes:
    """Return the payload of an OFFSET_DATA chunk."""
    return struct.pack(">Q", offset) + content


def hole(offset: int, count: int) -> bytes:
    """Return the payload of an OFFSET_HOLE chunk."""
    return struct.pack(">QI", offset, count)


def extents(context: int, *entries: int) -> bytes:
    """Return the payload of a BLOCK_STATUS chunk: lengths and flags alternate."""
    return struct.pack(f">I{len(entries)}I", context, *entries)


def wide_extents(context: int, *entries: int, claimed: int | None = None) -> bytes:
    """Return the payload of a BLOCK_STATUS_EXT chunk; pass claimed for a wrong number of pairs."""
    pairs = len(entries) // 2 if claimed is None else claimed
    return struct.pack(f">II{len(entries)}Q", context, pairs, *entries)


def failure(errno: int, message: bytes = b"", length: int | None = None) -> bytes:
    """Return the payload of an ERROR chunk; pass length for a wrong length of the message."""
    claimed = len(message) if length is None else length
    return struct.pack(">IH", errno, claimed & 0xFFFF) + message


#: The commands at which a DiskServer can stop; it can also stop at "greet" and "option".
COMMANDS = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_DISC: "disconnect",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "zero",
    CMD_BLOCK_STATUS: "block_status",
}
STRIPE = 64 << 10  # data and holes of this size alternate on the disk of a DiskServer


class DiskServer:
    """A server with a disk, for any number of clients, that can be made to stop answering.

    Its disk alternates between STRIPE bytes of data and STRIPE bytes of a hole. It stops at the
    first command of the kind that `stop` names, before it carries out the command and reads its
    payload; or, for "reply", in the middle of the reply to a read. From then on every connection
    stays open and receives nothing, until `resume` or `close`.

    Attributes:
        memory: The content of the disk.
        stopped: Set while the server does nothing.
        seen: The kinds of commands that have arrived, in order.
        line: How many bytes it sends or receives at once, and the seconds between; None for a line
            that is not slow.
    """

    def __init__(
        self,
        folder: Path,
        size: int = SIZE,
        flags: int = EXPORT_FLAGS | FLAG_CAN_MULTI_CONN,
        connections: int | None = None,
    ) -> None:
        """Listen in a folder.

        Args:
            folder: A short folder for the socket.
            size: The size of the disk in bytes.
            flags: The transmission flags of the export.
            connections: How many clients are greeted; None greets all.
        """
        self.memory = bytearray(size)
        for start in range(0, size, 2 * STRIPE):
            self.memory[start : start + STRIPE] = b"data" * (min(STRIPE, size - start) // 4)
        self.seen: list[str] = []
        self.line: tuple[int, float] | None = None
        self.stopped = threading.Event()
        self._info = export_info(size, flags)
        self._left = 1 << 30 if connections is None else connections
        self._stop_at: str | None = None
        self._on_stop: Callable[[], object] = bool
        self._resumed = threading.Event()
        self._lock = threading.Lock()
        self._wires: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self.socket = str(folder / f"disk-{id(self)}")
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._listener.bind(self.socket)
        self._listener.listen(64)
        self._start(self._accept)

    def stop(self, at: str, on_stop: Callable[[], object] = bool) -> None:
        """Stop at the first command of a kind, and then call on_stop in a thread of the server."""
        assert at in ("greet", "option", "reply", *COMMANDS.values()), at
        self._on_stop = on_stop
        self._stop_at = at

    def resume(self) -> None:
        """Reply to the requests that arrived meanwhile, and continue."""
        with self._lock:
            self._stop_at = None
            self.stopped.clear()
            resumed, self._resumed = self._resumed, threading.Event()
        resumed.set()

    def close(self) -> None:
        """Disconnect all clients, and end the threads."""
        self._stop_at = None
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self._wires:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.resume()
        for thread in self._threads:
            thread.join(BOUND)
        self._listener.close()

    def __enter__(self) -> DiskServer:
        """Return the server, which is listening."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the server."""
        self.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="disk server", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._wires.append(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with suppress(HungUp), sock:
            wire = _StoppingWire(sock, self)
            self._left -= 1
            if self._left < 0:
                wire.linger()
            self.reach("greet")
            wire.negotiate(contexts=[(1, b"base:allocation")], info=[self._info])
            while True:
                request = wire.any_request()
                kind = COMMANDS[request.command]
                self.seen.append(kind)
                self.reach(kind)
                if request.command == CMD_DISC:
                    return
                self._answer(wire, request)

    def reach(self, place: str) -> None:
        """Stop here if this is the chosen place, and wait while the server is stopped."""
        with self._lock:
            is_first = place == self._stop_at and not self.stopped.is_set()
            if is_first:
                self.stopped.set()
            resumed = self._resumed if self.stopped.is_set() else None
        if is_first:
            self._on_stop()
        if resumed is not None:
            resumed.wait()

    def slowly(self, count: int) -> Iterator[slice]:
        """Yield the parts of a number of bytes, at the speed of the line."""
        if self.line is None or count <= self.line[0]:
            yield slice(0, count)
            return
        at_once, seconds = self.line
        for start in range(0, count, at_once):
            time.sleep(seconds)
            yield slice(start, start + at_once)

    def _answer(self, wire: Wire, request: Request) -> None:
        start, end = request.offset, request.offset + request.count
        if request.command == CMD_WRITE:
            self.memory[start:end] = wire.receive(request.count)
        elif request.command in (CMD_WRITE_ZEROES, CMD_TRIM):
            self.memory[start:end] = bytes(request.count)
        elif request.command == CMD_BLOCK_STATUS:
            wire.chunk(request, CHUNK_BLOCK_STATUS, extents(1, *self._stripes(start, end)))
            return
        elif request.command == CMD_READ:
            content = bytes(self.memory[start:end])
            if wire.structured:
                wire.chunk(request, CHUNK_OFFSET_DATA, data(start, content))
            else:
                wire.simple(request.cookie, 0, content)
            return
        wire.simple(request.cookie)

    def _stripes(self, start: int, end: int) -> Iterator[int]:
        """Yield lengths and flags of the extents between two offsets."""
        while start < end:
            length = min(end - start, STRIPE - start % STRIPE)
            yield length
            yield 3 if self.memory.count(0, start, start + length) == length else 0
            start += length


class _StoppingWire(Wire):
    """A connection of a DiskServer."""

    def __init__(self, sock: socket.socket, server: DiskServer) -> None:
        super().__init__(sock)
        self._stopping = server

    def option(self) -> Option:
        """Receive the client's next option; the server may stop at it."""
        option = super().option()
        self._stopping.reach("option")
        return option

    def send(self, *parts: bytes) -> None:
        """Send bytes at the speed of the line; the server may stop in the middle of a reply."""
        whole = b"".join(parts)
        if len(whole) > BLOCK // 2:
            super().send(whole[: BLOCK // 2])
            self._stopping.reach("reply")
            whole = whole[BLOCK // 2 :]
        for part in self._stopping.slowly(len(whole)):
            super().send(whole[part])

    def receive(self, count: int) -> bytes:
        """Receive bytes at the speed of the line."""
        return b"".join(
            super(_StoppingWire, self).receive(len(range(count)[part]))
            for part in self._stopping.slowly(count)
        )
