# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.Client: a disk whose commands are awaited.

A command reserves a place among the commands in flight, or waits in line for one.  The queue sends
it, and its task awaits a future.  The event loop watches the descriptor of the queue.  When that is
readable, one step of the queue reports all commands that are done, and sets their futures.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from asyncio import _get_running_loop
from collections import OrderedDict
from functools import partial, update_wrapper
from sys import is_finalizing
from weakref import ref

from nbd._binding.buffer import readable, writable_by_call
from nbd._binding.callbacks import next_token
from nbd._binding.constants import CONTEXT_BASE_ALLOCATION
from nbd._binding.errors import ClosedHandle, Error, is_by_handler
from nbd._binding.memory import BOUNCES, copy_back, free, is_unowned, new_result, result_of
from nbd._binding.methods import NBD
from nbd._binding.shim import ffi, lib
from nbd._disks.connect import begin_shutdown, close_all
from nbd._disks.extents import Survey
from nbd._disks.queue import (
    CACHE,
    FLUSH,
    PIECE,
    READ,
    TARGET,
    TRIM,
    WRITE,
    ZERO,
    ShimQueue,
    as_request,
    failure,
    timeout_error,
)
from nbd._disks.reconnect import JOURNAL
from nbd.aio._threads import in_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import AsyncIterator, Callable, Coroutine
    from types import TracebackType
    from typing import Any, TypeVar, overload

    from _typeshed import ReadableBuffer, WriteableBuffer
    from typing_extensions import Concatenate, ParamSpec

    from nbd._binding.buffer import Buffer
    from nbd._disks.extents import Extent, Extents
    from nbd.aio._reconnect import Reconnection
    from nbd.types import Extent64Callback, ExtentCallback

    Parameters = ParamSpec("Parameters")
    Result = TypeVar("Result")
    Self = TypeVar("Self", bound="Client")

#: The result of a future, instead of an errno, when the client was closed.
_CLOSED = -1
#: If a timer fires more than this many seconds late, the process was suspended or the loop blocked.
_MAX_TIMER_DELAY = 0.1
#: A longer timeout than this many seconds, three years, is for ever: some loops limit their timers.
_MAX_TIMEOUT = 1e8

#: The methods of nbd.NBD that do not wait for the server, and that a client has too.
DELEGATED: list[str] = []

nbdqueue_submit = lib.nbdqueue_submit


def _delegate(
    ask: Callable[Concatenate[NBD, Parameters], Result],
) -> Callable[Concatenate[Client, Parameters], Result]:
    """Make a method of the client from a method of nbd.NBD that does not wait for the server."""

    name = ask.__name__

    def method(self: Client, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if self._reconnection is None:
            return ask(self.handles[0], *args, **kwargs)
        result: Result = getattr(self._reconnection.known, name)(*args, **kwargs)
        return result

    update_wrapper(method, ask)
    DELEGATED.append(name)
    return method


class Client:
    """A disk in an event loop of asyncio; nbd.aio.connect makes one.

    The methods have the names of those of nbd.NBD.  Methods that wait for the server are
    coroutines.  They raise nbd.Error if the command fails or the connection is lost, nbd.Timeout
    after the client's timeout, and nbd.ClosedHandle if the client is closed.

    A request may cover any range of the disk: it is cut into commands that fit the server's block
    size constraints.  Commands are not ordered: where the order matters, await in between.

    Attributes:
        handles: The connections, one nbd.NBD each, for calls that have no method here.  Those that
            wait would block the whole loop.  At first there is one; others are appended when they
            have joined.  With `reconnect`, a new one takes the place of one that was lost, which is
            closed.
    """

    __module__ = "nbd.aio"

    _is_closed = True  # until __init__ has succeeded

    def __init__(
        self,
        handles: list[NBD],
        depth: int,
        timeout: float | None,
        is_command: bool,
        reconnection: Reconnection | None = None,
    ) -> None:
        self._queue = queue = ShimQueue(depth, PIECE)
        try:
            if reconnection is not None:
                queue.set_reconnect(TARGET, JOURNAL)
            for handle in handles:
                queue.add(TARGET, handle)
            self._fd = queue.fileno()
        except BaseException:
            queue.close()  # closes the descriptors now, not when garbage is collected
            raise
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._depth = depth
        self._timeout = timeout
        self._is_command = is_command
        #: The future of each command that has a place in flight, by token; None for a place that a
        #: caller in line was given and has not used yet.  The pins are not here but in
        #: `ShimQueue.kept`, which lives as long as a command is in flight: through a future it
        #: would keep a task and this client alive.
        self._waiting: dict[int, Future[Any] | None] = {}
        self._line: OrderedDict[Future[int], None] = OrderedDict()
        self._turn = 0
        self._reconnection = reconnection
        #: The tasks that make further connections.  They do not refer to this client.
        self._joining: set[asyncio.Task[None]] = set()
        self.handles = tuple(handles)
        self._loop.add_reader(self._fd, _step, ref(self))
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{len(self._waiting)} commands in flight"
        return f"<nbd.aio.Client: {state}>"

    async def pread(self, count: int, offset: int, flags: int = 0) -> bytearray:
        """Read bytes of the disk.

        Args:
            count: The number of bytes, at most 128 MiB.
            offset: Where to start, in bytes from the start of the export.
            flags: 0, or nbd.CMD_FLAG_DF.

        Returns:
            A new bytearray.

        Raises:
            nbd.Error: The read failed; EINVAL if the range passes the end.
            ValueError: A number is out of range.

        C: nbd_aio_pread.
        """
        count, offset, flags = as_request(count, offset, flags)
        token = await self._reserve()
        try:
            result, pin = new_result(count)
        except BaseException:
            self._give_back(token)
            raise
        await self._run(token, READ, pin, count, offset, flags, pin)
        return result_of(result, pin)

    async def pread_into(self, buf: WriteableBuffer | Buffer, offset: int, flags: int = 0) -> None:
        """Read bytes of the disk into memory of the caller.

        A read that was cancelled keeps the memory until the server replies.  Until then the memory
        cannot be resized, and may be overwritten.

        Args:
            buf: Writable contiguous bytes-like object or nbd.Buffer, which is filled completely.
                On PyPy pass an nbd.Buffer; other objects cost a copy.
            offset, flags: As for pread.

        Raises:
            nbd.Error: As for pread.
            BufferError: buf is read-only or not contiguous.

        C: nbd_aio_pread.
        """
        pointer, size, pin, state, target = writable_by_call("buf", buf)
        size, offset, flags = as_request(size, offset, flags)
        token = await self._reserve()
        if state[0]:
            lib.nbdshim_clear_stale(state, pin, size)
        try:
            await self._run(token, READ, pointer, size, offset, flags, pin)
            if target is not None and (BOUNCES or is_unowned(target)):
                copy_back(target, pin)
                if BOUNCES:
                    free(pin)
        finally:
            del pointer, pin  # an exception keeps its frames alive, but must not keep the pin

    async def pwrite(self, buf: ReadableBuffer | Buffer, offset: int, flags: int = 0) -> None:
        """Write bytes to the disk.

        Args:
            buf: Contiguous bytes-like object or nbd.Buffer.  It must not change until the write is
                done.  A write that was cancelled may still send it later.
            offset, flags: As for nbd.NBD.pwrite.

        Raises:
            nbd.Error: The write failed; ENOSPC if the range passes the end.

        C: nbd_aio_pwrite; nbd_aio_pread too where a block has to be merged.
        """
        pointer, size, pin = readable("buf", buf)
        size, offset, flags = as_request(size, offset, flags)
        token = await self._reserve()
        try:
            await self._run(token, WRITE, pointer, size, offset, flags, pin)
        finally:
            del pointer, pin

    async def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """Write zeroes; if the server has no command for that, zeroes are sent.

        Args:
            count: The number of bytes.
            offset, flags: As for nbd.NBD.zero.

        Raises:
            nbd.Error: The command failed.

        C: nbd_aio_zero, or nbd_aio_pwrite.
        """
        await self._command(ZERO, count, offset, flags)

    async def trim(self, count: int, offset: int, flags: int = 0) -> None:
        """Tell the server that the whole blocks of a range are not needed any more.

        Args:
            count: The number of bytes.
            offset, flags: As for nbd.NBD.trim.

        Raises:
            nbd.Error: The command failed.

        C: nbd_aio_trim.
        """
        await self._command(TRIM, count, offset, flags)

    async def cache(self, count: int, offset: int, flags: int = 0) -> None:
        """Ask the server to load a range into its cache.

        Args:
            count: The number of bytes.
            offset, flags: As for nbd.NBD.cache.

        Raises:
            nbd.Error: The command failed.

        C: nbd_aio_cache.
        """
        await self._command(CACHE, count, offset, flags)

    async def flush(self, flags: int = 0) -> None:
        """Put the writes that are done already on stable storage.

        Args:
            flags: As for nbd.NBD.flush.

        Raises:
            nbd.Error: The command failed.

        C: nbd_aio_flush.
        """
        await self._command(FLUSH, 0, 0, flags)

    async def block_status(
        self, count: int, offset: int, extent: ExtentCallback, flags: int = 0
    ) -> None:
        """Ask for the status of a range in each negotiated context.

        `extents` is easier to use: it covers any range, and merges adjacent extents.

        Args:
            count: The number of bytes; the reply may cover less, or more.
            offset, flags: As for nbd.NBD.block_status.
            extent: Called in the event loop, once for each context, as extent(context, offset,
                entries, error); see nbd.NBD.block_status.

        Raises:
            nbd.Error: The command failed.  If extent raised, its exception is the cause.

        C: nbd_aio_block_status.
        """
        await self._ask("block_status", count, offset, extent, flags)

    async def block_status_64(
        self, count: int, offset: int, extent64: Extent64Callback, flags: int = 0
    ) -> None:
        """As block_status, with (length, flags) tuples of 64-bit numbers; since libnbd 1.20.

        C: nbd_aio_block_status_64.
        """
        await self._ask("block_status_64", count, offset, extent64, flags)

    if TYPE_CHECKING:

        @overload
        def extents(
            self,
            context: str = CONTEXT_BASE_ALLOCATION,
            *,
            start: int = 0,
            end: int | None = None,
        ) -> AsyncIterator[Extent]: ...

        @overload
        def extents(
            self,
            context: list[str] | tuple[str, ...],
            *,
            start: int = 0,
            end: int | None = None,
        ) -> AsyncIterator[Extents]: ...

    def extents(
        self,
        context: str | list[str] | tuple[str, ...] = CONTEXT_BASE_ALLOCATION,
        *,
        start: int = 0,
        end: int | None = None,
    ) -> AsyncIterator[Any]:
        """Iterate over the extents of the disk, or of a part of it, with `async for`.

        The extents cover the whole range, in order.  Adjacent extents differ in their flags.

        Args:
            context, start, end: As for nbd.extents.

        Returns:
            An asynchronous iterator of tuples (offset, length, flags).

        Raises:
            nbd.Error, ValueError: As for nbd.extents.

        C: nbd_aio_block_status_64, or nbd_aio_block_status.
        """
        self._check()
        r = self._reconnection
        return self._surveyed(
            Survey(self.handles[0] if r is None else r.known, context, start, end)
        )

    async def _surveyed(self, survey: Survey) -> AsyncIterator[Any]:
        while not survey.is_complete:
            question = survey.question()
            await self._ask(survey.method, question.count, question.offset, question.note, 0)
            for extent in survey.learn(question):
                yield extent

    get_size = _delegate(NBD.get_size)
    get_block_size = _delegate(NBD.get_block_size)
    get_export_name = _delegate(NBD.get_export_name)
    get_export_description = _delegate(NBD.get_export_description)
    get_canonical_export_name = _delegate(NBD.get_canonical_export_name)
    get_uri = _delegate(NBD.get_uri)
    get_protocol = _delegate(NBD.get_protocol)
    get_tls_negotiated = _delegate(NBD.get_tls_negotiated)
    get_structured_replies_negotiated = _delegate(NBD.get_structured_replies_negotiated)
    is_read_only = _delegate(NBD.is_read_only)
    is_rotational = _delegate(NBD.is_rotational)
    can_cache = _delegate(NBD.can_cache)
    can_df = _delegate(NBD.can_df)
    can_fast_zero = _delegate(NBD.can_fast_zero)
    can_flush = _delegate(NBD.can_flush)
    can_fua = _delegate(NBD.can_fua)
    can_meta_context = _delegate(NBD.can_meta_context)
    can_multi_conn = _delegate(NBD.can_multi_conn)
    can_trim = _delegate(NBD.can_trim)
    can_zero = _delegate(NBD.can_zero)

    async def close(self) -> None:
        """Close the connections.  A second close does nothing.

        Calls that are waiting for the server fail with nbd.ClosedHandle.  Commands that were sent
        may still be executed.  Flush first if the data has to be on stable storage.  If the server
        was started by a command line, this waits for its end, at most for the timeout.

        C: nbd_aio_disconnect, nbd_close.
        """
        self._check_loop()
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._fd)
        for future in (*self._waiting.values(), *self._line):
            if future is not None and not future.done():
                future.set_result(_CLOSED)
        self._line.clear()
        self._waiting.clear()
        self._queue.close()
        for task in self._joining:
            task.cancel()
        ends: list[Future[Any]] = [*self._joining]
        begin_shutdown([handle for handle in self.handles if not _is_busy(handle)])
        if self._is_command:  # libnbd waits for the end of the process
            ends += [in_thread(self._loop, partial(close_all, [one])) for one in self.handles]
        else:
            close_all(self.handles)
        if ends:
            await asyncio.wait(ends, timeout=self._timeout)

    async def __aenter__(self: Self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if is_finalizing is None or self._is_closed or is_finalizing():  # see Handle.__del__
            return
        self._is_closed = True
        # In a forked child the loop's selector is the parent's.
        if self._process == os.getpid() and not self._loop.is_closed():
            _unwatch_later(self._loop, self._fd, self._queue, self._joining)
        warnings.warn(
            "an nbd.aio.Client was not closed; use async with, or await its close()",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )

    def _is_usable(self) -> bool:
        return not self._is_closed and not self._loop.is_closed()

    def _start_joining(self, joining: Coroutine[Any, Any, None]) -> None:
        """Start a task that makes another connection; closing the client cancels it."""
        task = self._loop.create_task(joining)
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    def _join(self, handle: NBD) -> None:
        """Add a further connection, which the client will close."""
        self._check()
        self._queue.add(TARGET, handle)
        self.handles += (handle,)

    def _check_loop(self) -> None:
        if _get_running_loop() is not self._loop:
            raise RuntimeError(
                "this nbd.aio.Client belongs to another event loop: use it where it was connected, "
                "or connect one in this loop"
            )

    def _check(self) -> None:
        self._check_loop()
        if self._is_closed:
            raise _closed()

    async def _reserve(self) -> int:
        """Reserve a place among the commands in flight, in the order of the callers.

        Returns:
            A token, to be given to `_run` or `_give_back`.
        """
        if self._is_closed or _get_running_loop() is not self._loop:
            self._check()
        if self._line or len(self._waiting) >= self._depth:
            return await self._wait_in_line()
        token = next_token()
        self._waiting[token] = None
        return token

    async def _wait_in_line(self) -> int:
        future: Future[int] = self._loop.create_future()
        self._line[future] = None
        try:
            token = await self._by_timeout(future, "no place among the commands in flight was free")
        except BaseException:
            self._line.pop(future, None)
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())
            raise
        if token == _CLOSED:
            raise _closed()
        return token

    def _admit(self) -> None:
        """Give free places to the callers in line."""
        while self._line and len(self._waiting) < self._depth:
            future, _ = self._line.popitem(last=False)
            if not future.done():
                token = next_token()
                self._waiting[token] = None
                future.set_result(token)

    def _give_back(self, token: int) -> None:
        """Free a reserved place."""
        self._waiting.pop(token, None)
        self._queue.kept.pop(token, None)
        self._admit()

    async def _command(self, operation: int, count: int, offset: int, flags: int) -> None:
        """Run a command that has no buffer."""
        count, offset, flags = as_request(count, offset, flags)
        await self._run(await self._reserve(), operation, ffi.NULL, count, offset, flags)

    async def _run(
        self,
        token: int,
        operation: int,
        pointer: Any,
        length: int,
        offset: int,
        flags: int,
        pin: Any = None,
    ) -> None:
        """Submit a request, and wait until it is done."""
        queue = self._queue
        # Its result is 0, _CLOSED, or the errno and the offset of a failure.
        future: Future[Any] = self._loop.create_future()
        self._waiting[token] = future
        if pin is not None:
            queue.kept[token] = pin
        result = nbdqueue_submit(queue.q, operation, token, pointer, length, offset, flags)
        if result < 0:
            self._give_back(token)
            raise _closed() if self._is_closed else queue.refused(result)
        del pointer, pin
        try:
            if self._timeout is None:
                ended = await future
            else:
                ended = await self._by_timeout(future, "the server has not answered")
        except BaseException:
            if not self._is_closed:
                queue.cancel(token)
            raise
        if ended:
            if isinstance(ended, int):
                raise _closed()
            if self._reconnection is not None:
                self._reconnection.raise_failure(ended[0])
            raise failure(operation, length, offset, *ended)

    async def _by_timeout(self, future: Future[Result], late: str) -> Result:
        """Return the result of a future; raise nbd.Timeout if that takes too long.

        `late` begins the message: what has not happened within the timeout.
        """
        if self._timeout is None:
            return await future
        timer = _Timer(ref(self), future, late, self._timeout)
        try:
            return await future
        finally:
            timer.cancel()

    async def _ask(self, method: str, count: int, offset: int, extent: Any, flags: int) -> None:
        """Send a command that the shim's queue does not know, over one of the connections."""
        if not callable(extent):
            raise TypeError(f"extent: a callable is needed, not {type(extent).__name__}")
        token = await self._reserve()
        future: Future[int] = self._loop.create_future()
        self._waiting[token] = future
        question = Question(self, token, future, method, extent, (count, offset, flags))
        try:
            self._send(question)
        except BaseException:
            self._give_back(token)
            raise
        try:
            errnum = await self._by_timeout(future, "the server has not answered")
        except BaseException:
            question.is_wanted = False
            if self._reconnection is not None:
                self._reconnection.drop(self, question)
            raise
        if errnum == _CLOSED:
            raise _closed()
        if errnum:
            raised = question.raised
            if raised is not None and is_by_handler(raised.__traceback__):
                raise raised
            errnum = self._queue.error_of(question.handle) or errnum
            reason = f"{count} bytes at offset {offset} failed: {os.strerror(errnum)}"
            raise Error(f"nbd_{method}: {reason}", errnum) from raised

    def _send(self, question: Question) -> None:
        """Send a question over a connection that is alive."""
        if self._reconnection is not None:
            self._reconnection.ask(self, question)
            return
        handle = self._alive()
        if handle is None:
            errnum = self._queue.error_of(self.handles[self._turn])
            lost = f"the connection was lost: {os.strerror(errnum)}"
            raise Error(f"nbd_{question.method}: {lost}", errnum)
        question.send(handle)
        self._queue.wake()  # makes it watch the socket in the direction libnbd needs now

    def _alive(self) -> NBD | None:
        """Return the next connection that is alive; None if all were lost."""
        for _ in self.handles:
            self._turn = (self._turn + 1) % len(self.handles)
            handle = self.handles[self._turn]
            if not self._queue.error_of(handle):
                return handle
        return None


class Question:
    """A block_status command, and its callbacks, which libnbd calls.

    Attributes:
        token: Its place among the commands in flight.
        method: The handle's method that sends it, without "aio_".
        handle: The connection over which it was sent last.
        errnum: The errno with which it has failed last, or 0.
        raised: What the caller's function has raised, or None.
        is_wanted: Whether the caller still waits.
    """

    handle: NBD

    def __init__(
        self,
        client: Client,
        token: int,
        future: Future[int],
        method: str,
        extent: Any,
        arguments: tuple[int, int, int],
    ) -> None:
        self._client = ref(client)
        self.token = token
        self._future = future
        self.method = method
        self._extent = extent
        self._arguments = arguments
        self.handle = client.handles[0]
        self.errnum = 0
        self.raised: Exception | None = None
        self.is_wanted = True
        #: The contexts that the caller was told, and those of them from earlier connections.
        self._told: set[str] = set()
        self._told_before: frozenset[str] = frozenset()

    def send(self, handle: NBD) -> None:
        """Send the command; again, if the connection was lost before the reply was complete."""
        count, offset, flags = self._arguments
        self.handle = handle
        self.errnum = 0
        self._told_before = frozenset(self._told)
        send = getattr(handle, f"aio_{self.method}")
        send(count, offset, self.extent, self.completion, flags)

    def extent(self, context: str, offset: int, entries: list[Any], error: Any) -> int:
        """Call the caller's function, unless the caller was cancelled or knows the answer."""
        if not self.is_wanted or context in self._told_before:
            return 0
        extent = self._extent
        self._told.add(context)
        try:
            result = extent(context, offset, entries, error)
        except Exception as raised:
            self.raised = raised
            return -1
        return result if isinstance(result, int) else 0

    def completion(self, error: Any) -> int:
        """Free the place, and wake the caller; the result 1 retires the command."""
        self.errnum = errnum = error.value
        client = self._client()
        if errnum and client is not None and self._is_postponed(client, errnum):
            return 1
        if not self._future.done():
            self._future.set_result(errnum)
        if client is not None:
            client._give_back(self.token)
        return 1

    def fail(self, client: Client, reason: Exception) -> None:
        """End the command with an exception: it could not be sent."""
        if not self._future.done():
            self._future.set_exception(reason)
        client._give_back(self.token)

    def _is_postponed(self, client: Client, errnum: int) -> bool:
        """Whether the command is asked again over another connection."""
        if client._reconnection is None or client._is_closed or not self.is_wanted:
            return False
        if self.raised is not None or not client._reconnection.is_postponed(self, errnum):
            return False
        client._queue.wake()
        return True


def _step(client: ref[Client]) -> None:
    """Called by the event loop when the queue has work: set the futures of what is done."""
    self = client()
    if self is None or self._is_closed:
        return
    queue, waiting, kept = self._queue, self._waiting, self._queue.kept
    try:
        done, count = queue.step()
        for i in range(count):
            one = done[i]
            token = one.token
            future = waiting.get(token)
            if future is not None and not future.done():
                future.set_result((one.error, one.offset) if one.error else 0)
            waiting.pop(token, None)
            kept.pop(token, None)
        queue.take(done, count)
        if self._reconnection is not None:
            self._reconnection.look(self)
    except BaseException:
        queue.wake()  # the next step reports the same requests again
        raise
    if self._line:
        self._admit()


def _unwatch_later(
    loop: AbstractEventLoop, fd: int, queue: ShimQueue, joining: set[asyncio.Task[None]]
) -> None:
    """Make the loop stop watching a client that was dropped, perhaps in another thread.

    The queue has to live until then, because it closes the descriptor.
    """
    try:
        loop.call_soon_threadsafe(partial(_unwatch, loop, fd, queue, joining))
    except RuntimeError:  # the loop was closed meanwhile
        return


def _unwatch(
    loop: AbstractEventLoop, fd: int, queue: ShimQueue, joining: set[asyncio.Task[None]]
) -> None:
    loop.remove_reader(fd)
    for task in joining:
        task.cancel()
    queue.close()


class _Timer:
    """The timer of a call's timeout.

    When it fires, the reply may be there already: after the process was suspended, loops run timers
    before they look at descriptors.  So the queue makes one more step first.
    """

    __slots__ = ("_client", "_future", "_late", "_seconds", "_timer", "_until")

    def __init__(self, client: ref[Client], future: Future[Any], late: str, seconds: float) -> None:
        self._client = client
        self._future = future
        self._late = late
        self._seconds = seconds
        loop = future.get_loop()
        self._until = loop.time() + seconds
        self._timer = loop.call_at(self._until, self._expire)

    def cancel(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        """Called by the event loop."""
        future = self._future
        if future.done():
            return
        loop = future.get_loop()
        until = extended(self._until, loop.time(), self._seconds)
        try:
            _step(self._client)
        finally:
            if until > self._until:
                self._until = until
                self._timer = loop.call_at(until, self._expire)
            elif not future.done():
                future.set_exception(timeout_error(f"nbd.aio: {self._late} within", self._seconds))


def extended(until: float, now: float, seconds: float) -> float:
    """Extend the deadline `until` of a timeout of `seconds`, if its timer fired too late.

    A timer fires late if the process was suspended or the loop was blocked.  The server then gets
    that time again, at most the whole timeout.
    """
    behind = now - until
    return now + min(behind, seconds) if behind > _MAX_TIMER_DELAY else until


def limited(seconds: float) -> float | None:
    """Return a timeout that the timers of every loop accept; None is for ever."""
    return seconds if seconds <= _MAX_TIMEOUT else None


def _is_busy(handle: NBD) -> bool:
    """Return whether a handle has commands in flight, or no connection."""
    try:
        return handle.aio_in_flight() > 0
    except (Error, ClosedHandle):
        return True


def _closed() -> ClosedHandle:
    return ClosedHandle("the nbd.aio.Client is closed; connect another")
