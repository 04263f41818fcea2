# SPDX-License-Identifier: LGPL-2.0-or-later
"""How a client continues after a lost connection: nbd.aio.connect with reconnect=.

The queue keeps the commands of a lost connection, and what was written and not flushed.  Here a
task makes another connection, checks that it is to the same disk, and gives it to the queue.
"""

from __future__ import annotations

import asyncio
import os
from errno import ENOTCONN, ESHUTDOWN
from functools import partial
from socket import AF_UNIX, SHUT_RDWR, SOCK_STREAM, fromfd
from weakref import ref

from nbd._binding.errors import ClosedHandle, Error
from nbd._disks.handles import export_of
from nbd._disks.queue import TARGET
from nbd._disks.reconnect import Outage, check_same, is_worth_retrying, log_reconnected, other_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any

    from nbd._binding.methods import NBD
    from nbd.aio._client import Client, Question

    # Makes one attempt to connect; its argument is how many seconds that may take.
    Attempt = Callable[[float], Awaitable[NBD]]

#: The errnos of a command whose connection was lost, or whose server is ending.
_OF_LOSS = (ENOTCONN, ESHUTDOWN)
#: What surveys of extents ask besides; later versions of libnbd have it.
_OF_SURVEYS = ("get_extended_headers_negotiated",)
#: The arguments of nbd.NBD.get_block_size.
_SIZES = range(4)


class Reconnection:
    """What a client needs to replace its lost connections.

    It does not refer to the client, so that its tasks do not keep a client that was dropped.

    Args:
        seconds: For how long new connections are tried after a loss.
        server: The URI, for messages.
        first: The client's first connection; the others have to be to the same export.
        attempt: Makes a connection.
        close: Closes one, without blocking the loop.
        names: The methods that `known` answers.

    Attributes:
        known: Answers for the client's handle, also while the client has no connection.
        failure: Why no connection was made again; None while that may still happen.
    """

    def __init__(
        self,
        seconds: float,
        server: str,
        first: NBD,
        attempt: Attempt,
        close: Callable[[NBD], None],
        names: Iterable[str],
    ) -> None:
        self._seconds = seconds
        self._what = f"nbd.aio: the connection to {server}"
        self._export = export_of(first)
        self._attempt = attempt
        self._close = close
        self._names = [*names]
        self.known: Any = Known(first, self._names)
        self.failure: Error | None = None
        self._losses = 0
        #: The outage of each connection that was lost, or that has replaced a lost one.
        self._outages: dict[NBD, Outage] = {}
        #: The connections that are being replaced.
        self._lost: set[NBD] = set()
        #: Questions that wait for a connection.
        self._waiting: list[Question] = []

    def look(self, client: Client) -> None:
        """Begin to replace the connections that were lost since the last call."""
        losses = client._queue.losses()
        if losses != self._losses:
            for handle in client.handles:
                errnum = client._queue.error_of(handle)
                if errnum and handle not in self._lost and self.failure is None:
                    self._begin(client, handle, errnum)
            self._losses = losses  # last: if a signal handler raises, the next step looks again
        if self._waiting:
            self._ask_waiting(client)

    def _begin(self, client: Client, handle: NBD, errnum: int) -> None:
        outage = self._outages.get(handle)
        if outage is None:
            self._outages[handle] = outage = Outage(self._seconds, self._what)
        reason = Error(os.strerror(errnum), errnum)
        outage.lost(reason, client._queue.answers(TARGET), is_idle=not client._waiting)
        client._start_joining(self._replace(ref(client), handle, outage))
        self._lost.add(handle)

    async def _replace(self, client: ref[Client], lost: NBD, outage: Outage) -> None:
        """Replace a lost connection, or give it up when the time is over."""
        try:
            while True:
                made = await self._connected(outage)
                if self._is_replaced(client(), lost, outage, made):
                    return
        except BaseException as reason:
            if isinstance(reason, (Exception, asyncio.CancelledError)):
                failure = reason if isinstance(reason, Error) else outage.failure()
                cause = reason if isinstance(reason, Exception) and failure is not reason else None
                self._give_up(client(), lost, failure, cause)
            else:
                self._try_later(client(), lost)  # a signal handler has raised
            if not isinstance(reason, Exception):
                raise

    async def _connected(self, outage: Outage) -> NBD:
        """Make a connection, with pauses between the attempts.

        Raises:
            nbd.Error: The time is over, or a further attempt would fail in the same way.
        """
        while True:
            pause = outage.next_pause()
            if pause is None:
                raise outage.failure()
            await asyncio.sleep(pause)
            try:
                return await self._attempt(outage.remaining())
            except Error as reason:
                if not is_worth_retrying(reason):
                    raise

    def _is_replaced(self, client: Client | None, lost: NBD, outage: Outage, made: NBD) -> bool:
        """Put a new connection in the place of a lost one.

        Returns:
            False if the new connection has ended already.

        Raises:
            nbd.Error: It is a connection to another disk.
        """
        if client is None or client._is_closed or lost not in client.handles:
            self._close(made)
            return True
        try:
            check_same(self._what, self._export, made)
            known = Known(made, self._names)
            self._add(client, made)
            self._outages[made] = outage
            client.handles = tuple(made if one is lost else one for one in client.handles)
        except BaseException as reason:
            if made in client.handles:  # a signal handler has raised after the last line
                raise
            self._close(made)
            if isinstance(reason, Error) and is_worth_retrying(reason):
                return False
            raise
        self.known = known
        self._forget(client, lost)
        log_reconnected(self._what, outage)
        self._ask_waiting(client)
        return True

    def _add(self, client: Client, made: NBD) -> None:
        try:
            client._queue.add(TARGET, made)
        except ValueError as refusal:
            raise other_disk(self._what, str(refusal)) from None

    def _give_up(
        self, client: Client | None, lost: NBD, failure: Error, cause: Exception | None
    ) -> None:
        """Leave a lost connection out; if it is the last one, all commands fail from now on."""
        if client is None or client._is_closed or lost not in client.handles:
            return
        others = tuple(one for one in client.handles if one is not lost)
        if others:  # they are alive, or are being replaced
            client.handles = others
            self._forget(client, lost)
            return
        self.failure = failure = Error(failure.string, failure.errnum or ENOTCONN)
        failure.__cause__ = cause
        client._queue.give_up(TARGET, failure.errnum)
        client._queue.wake()
        self._ask_waiting(client)

    def _try_later(self, client: Client | None, lost: NBD) -> None:
        """Have the next step begin again to replace a lost connection."""
        if client is not None and not client._is_closed:
            self._lost.discard(lost)
            self._losses = -1
            client._queue.wake()

    def _forget(self, client: Client, lost: NBD) -> None:
        client._queue.forget(lost)
        self._outages.pop(lost, None)
        self._lost.discard(lost)
        self._close(lost)

    def raise_failure(self, errnum: int) -> None:
        """Raise the failure if it is the reason for the error of a command."""
        failure = self.failure
        if failure is not None and errnum == failure.errnum:
            raise _copy_of(failure, failure.__cause__)

    def ask(self, client: Client, question: Question) -> None:
        """Send a question now, or as soon as there is a connection."""
        self._waiting.append(question)
        self._ask_waiting(client)

    def is_postponed(self, question: Question, errnum: int) -> bool:
        """Whether a question that has failed will be asked again; called inside libnbd."""
        if errnum not in _OF_LOSS or self.failure is not None:
            return False
        self._waiting.append(question)
        return True

    def drop(self, client: Client, question: Question) -> None:
        """Do not ask a question again: nobody waits for the answer."""
        if question in self._waiting:
            self._waiting.remove(question)
            client._give_back(question.token)

    def _ask_waiting(self, client: Client) -> None:
        """Send the questions that can be sent."""
        for question in self._waiting[:]:
            if self._is_sent(client, question):
                self._waiting.remove(question)

    def _is_sent(self, client: Client, question: Question) -> bool:
        """Send a question, unless it has to wait; if it cannot be sent, it fails."""
        before = question.handle
        if question.errnum == ESHUTDOWN and before in client.handles and _is_alive(before):
            _hang_up(before)  # the server ends, but may keep the connection for a while
            return False
        handle = client._alive()
        try:
            if self.failure is not None:
                self.raise_failure(self.failure.errnum)
            if handle is None:
                return False
            question.send(handle)
        except Exception as reason:
            if isinstance(reason, Error) and handle is not None and not _is_alive(handle):
                client._queue.wake()  # it finds that the connection was lost
                return False
            question.fail(client, reason)
        return True


class Known:
    """The answers of a connected handle, which it does not give any more when it is dead.

    It has the handle's methods.

    Args:
        handle: The handle.
        names: The methods that are answered from memory.
    """

    def __init__(self, handle: NBD, names: Iterable[str]) -> None:
        self._handle = handle
        self._answers: dict[tuple[object, ...], Any] = {}
        contexts = [handle.get_meta_context(i) for i in range(handle.get_nr_meta_contexts())]
        arguments: dict[str, Iterable[Any]] = {
            "get_block_size": [(size,) for size in _SIZES],
            "can_meta_context": [(context,) for context in contexts],
        }
        for name in (*names, *(one for one in _OF_SURVEYS if hasattr(handle, one))):
            for given in arguments.get(name, [()]):
                self._answers[(name, *given)] = _answer(getattr(handle, name), *given)

    def can_meta_context(self, metacontext: str) -> bool:
        """Return whether a context was negotiated: one that was not asked for was not."""
        if not isinstance(metacontext, str):
            return self._handle.can_meta_context(metacontext)  # raises
        answer: bool = self._ask("can_meta_context", lambda _: False, metacontext)
        return answer

    def __getattr__(self, name: str) -> Any:
        return partial(self._ask, name, getattr(self._handle, name))

    def _ask(self, name: str, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        known = self._answers.get((name, *args, *kwargs.values()), self)
        if known is self:
            return ask(*args, **kwargs)
        if isinstance(known, Error):
            raise _copy_of(known)
        return known


def _answer(ask: Callable[..., Any], *args: Any) -> Any:
    """Return the answer of a method, or the error that it raises."""
    try:
        return ask(*args)
    except Error as refusal:
        return _copy_of(refusal)


def _copy_of(error: Error, cause: BaseException | None = None) -> Error:
    """Return an exception without a traceback, which would keep its frames alive."""
    copy = Error(error.string, error.errnum)
    copy.__cause__ = cause
    return copy


def _is_alive(handle: NBD) -> bool:
    try:
        return not handle.aio_is_dead() and not handle.aio_is_closed()
    except ClosedHandle:
        return False


def _hang_up(handle: NBD) -> None:
    """Shut a connection down, so that it is lost at once."""
    try:
        with fromfd(handle.aio_get_fd(), AF_UNIX, SOCK_STREAM) as sock:
            sock.shutdown(SHUT_RDWR)
    except (Error, ClosedHandle, OSError):  # it has ended already
        return
