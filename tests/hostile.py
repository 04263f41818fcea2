"""A scripted NBD server for tests of what the client does when the server misbehaves.

A script is a function of one Wire, the server's end of a connection. It runs in a thread and sends
what it likes: the methods of Wire follow the protocol as far as a script wants that, and no
further. When a script returns the connection is closed. It depends on nothing but the standard
library, so that what it believes of the protocol is not what the client believes.
"""

from __future__ import annotations

import faulthandler
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
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

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_BLOCK_STATUS = 0, 1, 2, 3, 4, 7

CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_BLOCK_STATUS_EXT = 6
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2
CHUNK_DONE = 1

BOUND = 10.0  # seconds until the watchdog hangs up on a client that still waits
FATAL = 60.0  # seconds more until a client is killed that still waits then


class HungUp(Exception):
    """The client closed the connection: the end of every script that waits for more."""


@dataclass(frozen=True)
class Option:
    """What the client sends during the handshake."""

    code: int
    payload: bytes


@dataclass(frozen=True)
class Request:
    """What the client sends once it is connected."""

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
        """Stay silent, and connected, until the client or the watchdog hangs up."""
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
        """Refuse options until the one with this code comes."""
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
        """Send a reply to an option; length is what the header claims, if that is to be a lie."""
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
        """Do a whole handshake as a good server does.

        Args:
            structured: Agree to structured replies.
            extended: Agree to extended headers.
            contexts: Numbers and names of the contexts to select, asked for or not.
            info: What to tell of the export, in place of its size and flags.
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
        """Receive the client's next request; what is to be written is not read."""
        wanted, layout = REQUEST_MAGIC, ">IHHQQI"
        if self.extended:
            wanted, layout = EXTENDED_REQUEST_MAGIC, ">IHHQQQ"
        magic, *fields = struct.unpack(layout, self.receive(struct.calcsize(layout)))
        assert magic == wanted, hex(magic)
        if fields[1] == CMD_DISC:
            raise HungUp
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
        """Send a chunk of a structured reply; cookie and length can be made to lie."""
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
    """A bound on how long a block may take; what it does when it barks must wake the client.

    A client that not even that wakes is ended with the whole process, and a traceback.
    """

    def __init__(self, seconds: float, bark: Callable[[], object]) -> None:
        """Prepare to call bark after this many seconds."""
        self.late = False
        self._bark = bark
        self._seconds = seconds
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def _expire(self) -> None:
        self.late = True
        self._bark()

    def __enter__(self) -> Watchdog:
        """Start to watch."""
        faulthandler.dump_traceback_later(self._seconds + FATAL, exit=True)
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop to watch."""
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()


class Connection:
    """A script that runs in a thread, and the socket that its client has to connect.

    A watchdog closes the connection after a while, so that no client can wait for ever; that it
    had to is an error unless the script is silent on purpose.
    """

    def __init__(self, script: Script, bound: float = BOUND, silent: bool = False) -> None:
        """Prepare to run a script.

        Args:
            script: What the server does.
            bound: How many seconds the client has.
            silent: Whether the client is to wait until the watchdog hangs up.
        """
        self._script = script
        self._silent = silent
        self._server, self.client = socket.socketpair()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._outcome: Future[None] = Future()
        self._watchdog = Watchdog(bound, self._hang_up)

    def fileno(self) -> int:
        """Give the client's socket away: the caller owns the descriptor."""
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
        """End the script, and fail if it was wrong itself or its client did not come back."""
        self._hang_up()
        self._pool.shutdown()
        self._watchdog.__exit__(kind, error, traceback)
        self._server.close()
        self.client.close()
        self._outcome.result()
        late = self._watchdog.late
        assert late == self._silent, f"the watchdog had to hang up on the client: {late}"


def export_info(size: int = SIZE, flags: int = EXPORT_FLAGS) -> bytes:
    """Return the item of a reply to GO that tells the export's size and flags."""
    return struct.pack(">HQH", INFO_EXPORT, size, flags)


def counted(text: bytes) -> bytes:
    """Return text behind its length, as the handshake has names."""
    return struct.pack(">I", len(text)) + text


def data(offset: int, content: bytes) -> bytes:
    """Return the payload of an OFFSET_DATA chunk."""
    return struct.pack(">Q", offset) + content


def hole(offset: int, count: int) -> bytes:
    """Return the payload of an OFFSET_HOLE chunk."""
    return struct.pack(">QI", offset, count)


def extents(context: int, *entries: int) -> bytes:
    """Return the payload of a BLOCK_STATUS chunk: lengths and flags in turn."""
    return struct.pack(f">I{len(entries)}I", context, *entries)


def wide_extents(context: int, *entries: int, claimed: int | None = None) -> bytes:
    """Return the payload of a BLOCK_STATUS_EXT chunk; claimed is its number of pairs, or a lie."""
    pairs = len(entries) // 2 if claimed is None else claimed
    return struct.pack(f">II{len(entries)}Q", context, pairs, *entries)


def failure(errno: int, message: bytes = b"", length: int | None = None) -> bytes:
    """Return the payload of an ERROR chunk; length is that of the message, or a lie."""
    claimed = len(message) if length is None else length
    return struct.pack(">IH", errno, claimed & 0xFFFF) + message
