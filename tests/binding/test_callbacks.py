"""Callbacks of each kind: their arguments, their results, and the exceptions that they raise.

Each kind is tried by one call that is certain to run its callback. A callback of three of the kinds
can fail the call to which it belongs; libnbd ignores the result of the others.
"""

from __future__ import annotations

import errno
import gc
import select
import sys
import threading
from contextlib import suppress
from typing import Any, Callable

import pytest
from support.handles import drain, finish, poll, raiser, retired, run_until
from support.servers import StartServer
from support.sizes import MIB

import nbd
from nbd._binding import errors

BASE = nbd.CONTEXT_BASE_ALLOCATION

Callback = Callable[..., Any]


def debug(handle: nbd.NBD, callback: Callback) -> None:
    """Run a debug callback for the messages of one call, without those of setting it up."""

    def only_of_get_handle_name(function: str, message: str) -> Any:
        return callback(function, message) if function == "nbd_get_handle_name" else 0

    handle.set_debug_callback(only_of_get_handle_name)
    handle.set_debug(True)
    try:
        handle.get_handle_name()
    finally:
        handle.set_debug(False)


# The kinds of callback, each with a call on a connected handle that runs it.
FAILING: dict[str, Callable[[nbd.NBD, Callback], object]] = {
    "extent": lambda h, call: h.block_status(MIB, 0, call),
    "chunk": lambda h, call: h.pread_structured(512, 0, call),
}

# The same for commands in flight: no call is running that could raise a callback's exception.
IN_FLIGHT: dict[str, Callable[[nbd.NBD, Callback], int]] = {
    "completion of aio_pread": lambda h, call: h.aio_pread(bytearray(512), 0, call),
    "completion of aio_pwrite": lambda h, call: h.aio_pwrite(bytes(512), 0, call),
    "completion of aio_flush": lambda h, call: h.aio_flush(call),
    "extent of aio_block_status": lambda h, call: h.aio_block_status(MIB, 0, call),
    "chunk of aio_pread_structured": lambda h, call: h.aio_pread_structured(
        bytearray(512), 0, call
    ),
}

# libnbd ignores what these return, so that the call succeeds.  They run during negotiation.
IGNORED: dict[str, Callable[[nbd.NBD, Callback], object]] = {
    "list": lambda h, call: h.opt_list(call),
    "context": lambda h, call: h.opt_list_meta_context(call),
    "debug": debug,
}

every_failing = pytest.mark.parametrize("run", FAILING.values(), ids=FAILING)
every_in_flight = pytest.mark.parametrize("run", IN_FLIGHT.values(), ids=IN_FLIGHT)
every_ignored = pytest.mark.parametrize("run", IGNORED.values(), ids=IGNORED)
every_stop = pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])


def recorded(run: Callable[[nbd.NBD, Callback], object], handle: nbd.NBD) -> list[tuple[Any, ...]]:
    """Return the arguments of each call of a callback."""
    calls: list[tuple[Any, ...]] = []
    run(handle, lambda *arguments: calls.append(arguments))
    if handle.aio_is_ready() or handle.aio_is_processing():
        drain(handle)
    return calls


# their arguments


def test_extent_gets_context_offset_flat_list_and_error(disk: nbd.NBD) -> None:
    ((context, offset, entries, error),) = recorded(FAILING["extent"], disk)
    assert (context, offset) == (BASE, 0)
    assert entries == [MIB, nbd.STATE_HOLE | nbd.STATE_ZERO]
    assert [type(thing) for thing in (context, offset, entries, entries[0])] == [
        str,
        int,
        list,
        int,
    ]
    assert error.value == 0


def test_extent_of_aio_gets_the_same(disk: nbd.NBD) -> None:
    ((context, offset, entries, error),) = recorded(IN_FLIGHT["extent of aio_block_status"], disk)
    assert (context, offset, entries) == (BASE, 0, [MIB, nbd.STATE_HOLE | nbd.STATE_ZERO])
    assert error.value == 0


def test_chunk_gets_read_only_view_offset_status_and_error(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 512, 0)
    ((view, offset, status, error),) = recorded(FAILING["chunk"], disk)
    assert type(view) is memoryview
    assert (view.readonly, view.nbytes, view.format, bytes(view)) == (True, 512, "B", b"x" * 512)
    assert (offset, status, error.value) == (0, nbd.READ_DATA, 0)
    view.release()


def test_chunk_of_aio_gets_the_same(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 512, 0)
    seen: list[Any] = []

    def chunk(view: memoryview, offset: int, status: int, error: Any) -> None:
        seen.append((type(view), view.readonly, bytes(view), offset, status, error.value))

    finish(disk, disk.aio_pread_structured(bytearray(512), 0, chunk))
    assert seen == [(memoryview, True, b"x" * 512, 0, nbd.READ_DATA, 0)]


def test_completion_gets_the_error_alone(disk: nbd.NBD) -> None:
    ((error,),) = recorded(IN_FLIGHT["completion of aio_pread"], disk)
    assert (type(error.value), error.value) == (int, 0)


def test_an_error_is_true_if_it_is_one(disk: nbd.NBD) -> None:
    seen: list[bool] = []

    def completion(error: Any) -> int:
        seen.append(bool(error))
        error.value = errno.ENOSPC
        seen.append(bool(error))
        return 1

    disk.aio_flush(completion)
    drain(disk)
    assert seen == [False, True]


def test_list_gets_name_and_description(nbdkit: StartServer, h: nbd.NBD) -> None:
    exports = r"list_exports=printf 'INTERLEAVED\nname\ntext\n'"
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("eval", "get_size=echo 1M", "pread=exit 1", exports).socket)
    assert recorded(IGNORED["list"], h) == [("name", "text")]


def test_context_gets_the_name(opt: nbd.NBD) -> None:
    assert (BASE,) in recorded(IGNORED["context"], opt)


def test_debug_gets_function_and_message(h: nbd.NBD) -> None:
    calls = recorded(IGNORED["debug"], h)
    assert {(type(function), type(message)) for function, message in calls} == {(str, str)}
    assert calls[0] == ("nbd_get_handle_name", "enter:")


def test_debug_is_silent_once_it_is_cleared(h: nbd.NBD, capfd: Any) -> None:
    calls: list[Any] = []
    h.set_debug_callback(lambda *message: calls.append(message))
    h.clear_debug_callback()
    h.set_debug(True)
    h.get_handle_name()
    h.set_debug(False)
    assert calls == []
    assert "nbd_get_handle_name" in capfd.readouterr().err


@pytest.mark.parametrize("raw", [b"\xff", b"caf\xe9", "größe".encode()])
def test_names_of_any_bytes_arrive_and_can_be_given_back(
    nbdkit: StartServer, h: nbd.NBD, raw: bytes
) -> None:
    octal = "".join(f"\\{byte:03o}" for byte in raw)
    exports = f"list_exports=printf 'INTERLEAVED\\n{octal}\\n{octal}\\n'"
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("eval", "get_size=echo 1M", "pread=exit 1", exports).socket)
    ((name, description),) = recorded(IGNORED["list"], h)
    assert name.encode("utf-8", "surrogateescape") == raw
    assert description == name
    h.set_export_name(name)
    h.opt_go()
    assert h.get_export_name() == name


def test_extents_of_two_contexts_are_two_calls(
    nbdkit: StartServer, h: nbd.NBD, qemu_nbd: Any, dirty_qcow2: Any
) -> None:
    h.add_meta_context(BASE)
    h.add_meta_context("qemu:dirty-bitmap:bitmap0")
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0").socket)
    calls = recorded(FAILING["extent"], h)
    assert sorted(context for context, *_ in calls) == [BASE, "qemu:dirty-bitmap:bitmap0"]


# their results


@pytest.mark.parametrize("result", [None, 0, 1, 2, "text", 1.5, object()])
@every_failing
def test_anything_but_minus_one_is_success(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object], result: Any
) -> None:
    run(disk, lambda *arguments: result)
    assert disk.aio_is_ready()


@every_failing
def test_minus_one_fails_the_call_without_a_cause(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    with pytest.raises(nbd.Error) as caught:
        run(disk, lambda *arguments: -1)
    assert caught.value.errnum == errno.EPROTO
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EILSEQ])
@every_failing
def test_error_value_is_the_errno_of_the_failed_call(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object], number: int
) -> None:
    def callback(*arguments: Any) -> int:
        arguments[-1].value = number
        return -1

    with pytest.raises(nbd.Error) as caught:
        run(disk, callback)
    assert caught.value.errnum == number


@every_failing
def test_error_value_alone_fails_nothing(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    def callback(*arguments: Any) -> int:
        arguments[-1].value = errno.ENOSPC
        return 0

    run(disk, callback)
    assert disk.aio_is_ready()


def test_error_value_of_one_callback_is_seen_by_the_next(disk: nbd.NBD) -> None:
    seen: list[int] = []

    def chunk(view: memoryview, offset: int, status: int, error: Any) -> int:
        error.value = errno.ENOSPC
        return -1

    def completion(error: Any) -> int:
        seen.append(error.value)
        return 1

    disk.aio_pread_structured(bytearray(512), 0, chunk, completion)
    drain(disk)
    assert seen == [errno.ENOSPC]


def test_a_completion_can_fail_its_command(disk: nbd.NBD) -> None:
    def completion(error: Any) -> int:
        error.value = errno.ENOSPC
        return -1

    cookie = disk.aio_flush(completion)
    with pytest.raises(nbd.Error) as caught:
        finish(disk, cookie)
    assert caught.value.errnum == errno.ENOSPC


@pytest.mark.parametrize("result", [1, True])
def test_a_completion_retires_with_one(disk: nbd.NBD, result: Any) -> None:
    disk.aio_flush(lambda error: result)
    drain(disk)
    assert retired(disk)


@pytest.mark.parametrize("result", [0, None, False, 2, "1", 1.0])
def test_a_completion_does_not_retire_with_anything_else(disk: nbd.NBD, result: Any) -> None:
    cookie = disk.aio_flush(lambda error: result)
    drain(disk)
    assert disk.aio_peek_command_completed() == cookie
    finish(disk, cookie)


@pytest.mark.parametrize("result", [1 << 31, 1 << 64, -(1 << 40)])
def test_a_result_that_does_not_fit_a_c_int_is_a_failure(
    disk: nbd.NBD, unraisable: list[Any], result: int
) -> None:
    with pytest.raises(nbd.Error):
        disk.pread_structured(512, 0, lambda *chunk: result)
    assert disk.aio_is_ready()


def test_a_completion_whose_result_is_no_c_int_is_called_once(
    disk: nbd.NBD, unraisable: list[Any]
) -> None:
    calls = []

    def completed(error: Any) -> int:
        calls.append(error)
        return 1 << 31

    cookie = disk.aio_flush(completed)
    drain(disk)
    with suppress(nbd.Error):
        finish(disk, cookie)
    assert len(calls) == 1
    assert [type(error) for error in unraisable] == [OverflowError]


def test_what_a_destructor_reports_meanwhile_is_still_the_cause(
    disk: nbd.NBD, unraisable: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_while_garbage_is_collected(one: Any) -> bool:
        nbd.NBD().__del__()
        return look(one)

    look = errors._is_urgent
    monkeypatch.setattr(errors, "_is_urgent", look_while_garbage_is_collected)
    with pytest.raises(nbd.Error) as caught:
        disk.pread_structured(512, 0, lambda *chunk: 1 << 31)
    assert isinstance(caught.value.__cause__, OverflowError)
    assert caught.value.__cause__ in unraisable


@pytest.mark.parametrize("value", ["text", None, 1 << 40])
def test_an_error_value_that_does_not_fit_a_c_int_is_a_failure(
    disk: nbd.NBD, unraisable: list[Any], value: Any
) -> None:
    def chunk(view: memoryview, offset: int, status: int, error: Any) -> int:
        error.value = value
        return -1

    with pytest.raises(nbd.Error):
        disk.pread_structured(512, 0, chunk)
    assert disk.aio_is_ready()


# their exceptions


@pytest.mark.parametrize("kind", [ValueError, AssertionError, StopIteration, MemoryError])
@every_failing
def test_an_exception_is_the_cause_of_the_failed_call(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object], kind: type[Exception]
) -> None:
    raised = kind("mine")
    with pytest.raises(nbd.Error) as caught:
        run(disk, raiser(raised))
    assert caught.value.__cause__ is raised


@every_failing
def test_the_traceback_of_the_cause_shows_the_callback(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    with pytest.raises(nbd.Error) as caught:
        run(disk, raiser(ValueError()))
    assert caught.value.__cause__ is not None
    traceback = caught.value.__cause__.__traceback__
    names = []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert names[-1] == "callback"


@every_failing
def test_error_value_is_the_errno_of_a_call_whose_callback_raised(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    def callback(*arguments: Any) -> None:
        arguments[-1].value = errno.ENOSPC
        raise ValueError

    with pytest.raises(nbd.Error) as caught:
        run(disk, callback)
    assert caught.value.errnum == errno.ENOSPC


@every_failing
def test_a_callback_with_the_wrong_parameters_is_an_exception_too(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    with pytest.raises(nbd.Error) as caught:
        run(disk, lambda: 0)
    assert type(caught.value.__cause__) is TypeError


def test_an_nbd_error_of_another_handle_is_a_cause_as_well(disk: nbd.NBD, h: nbd.NBD) -> None:
    with nbd.NBD() as other, pytest.raises(nbd.Error) as caught:
        disk.pread_structured(512, 0, lambda *chunk: other.pread(512, 0))
    assert isinstance(caught.value.__cause__, nbd.Error)
    assert caught.value.__cause__.errno == "ENOTCONN"


def test_each_callback_that_raised_is_accounted_for(
    qemu_nbd: Any, dirty_qcow2: Any, h: nbd.NBD, unraisable: list[Any]
) -> None:
    h.add_meta_context(BASE)
    h.add_meta_context("qemu:dirty-bitmap:bitmap0")
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0").socket)
    raised = [ValueError("first"), ValueError("second")]
    waiting = iter(raised)

    def extent(*arguments: Any) -> None:
        raise next(waiting)

    with pytest.raises(nbd.Error) as caught:
        h.block_status(MIB, 0, extent)
    assert caught.value.__cause__ is raised[0]
    assert unraisable == raised[1:]


@every_failing
def test_the_handle_works_after_an_exception(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    with pytest.raises(nbd.Error):
        run(disk, raiser(ValueError()))
    run(disk, lambda *arguments: 0)
    with pytest.raises(nbd.Error) as caught:
        disk.pread(512, MIB)
    assert caught.value.__cause__ is None


@every_ignored
def test_an_exception_that_fails_nothing_is_reported(
    opt: nbd.NBD, unraisable: list[Any], run: Callable[[nbd.NBD, Callback], object]
) -> None:
    raised = ValueError("mine")
    run(opt, raiser(raised))
    assert unraisable != []
    assert all(exception is raised for exception in unraisable)


@every_in_flight
def test_an_exception_of_a_command_in_flight_is_reported(
    disk: nbd.NBD, unraisable: list[Any], run: Callable[[nbd.NBD, Callback], int]
) -> None:
    raised = ValueError("mine")
    cookie = run(disk, raiser(raised))
    with suppress(nbd.Error):  # the next tests check the command
        finish(disk, cookie)
    assert unraisable == [raised]


@pytest.mark.parametrize("kind", ["extent of aio_block_status", "chunk of aio_pread_structured"])
def test_a_command_in_flight_fails_if_its_callback_raised(
    disk: nbd.NBD, unraisable: list[Any], kind: str
) -> None:
    cookie = IN_FLIGHT[kind](disk, raiser(ValueError("mine")))
    with pytest.raises(nbd.Error) as caught:
        finish(disk, cookie)
    assert caught.value.errnum == errno.EPROTO


def test_a_command_whose_completion_raised_is_not_retired(
    disk: nbd.NBD, unraisable: list[Any]
) -> None:
    cookie = disk.aio_flush(raiser(ValueError("mine")))
    drain(disk)
    assert disk.aio_peek_command_completed() == cookie


def test_an_unraisable_exception_has_a_traceback(
    opt: nbd.NBD, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(args))
    opt.opt_list(raiser(ValueError("mine")))
    assert [args.exc_type for args in seen] == [ValueError]
    assert seen[0].exc_traceback is seen[0].exc_value.__traceback__ is not None


def test_the_default_hook_prints_an_unraisable_exception(
    opt: nbd.NBD, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    opt.opt_list(raiser(ValueError("mine")))
    assert "ValueError: mine" in capsys.readouterr().err


# KeyboardInterrupt and SystemExit are raised by the call that ran the callback


@every_stop
@every_failing
def test_a_call_that_waits_raises_a_stop(
    disk: nbd.NBD,
    run: Callable[[nbd.NBD, Callback], object],
    stop: type[BaseException],
) -> None:
    raised = stop("mine")
    with pytest.raises(stop) as caught:
        run(disk, raiser(raised))
    assert caught.value is raised


@every_stop
@every_ignored
def test_a_call_that_would_have_succeeded_raises_a_stop(
    opt: nbd.NBD,
    unraisable: list[Any],
    run: Callable[[nbd.NBD, Callback], object],
    stop: type[BaseException],
) -> None:
    raised = stop("mine")
    with pytest.raises(stop) as caught:
        run(opt, raiser(raised))
    assert caught.value is raised


@every_stop
@every_in_flight
def test_poll_raises_a_stop(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], int], stop: type[BaseException]
) -> None:
    raised = stop("mine")
    with pytest.raises(stop) as caught:  # noqa: PT012 - the command itself may be what runs it
        run(disk, raiser(raised))
        while True:
            poll(disk)
    assert caught.value is raised


@every_stop
def test_aio_notify_read_raises_a_stop(disk: nbd.NBD, stop: type[BaseException]) -> None:
    disk.aio_flush(raiser(stop()))
    with pytest.raises(stop):  # noqa: PT012
        while True:
            select.select([disk.aio_get_fd()], [], [], 20)
            disk.aio_notify_read()


@every_failing
def test_the_handle_works_after_a_stop(
    disk: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(disk, raiser(KeyboardInterrupt()))
    run(disk, lambda *arguments: 0)
    assert disk.pread(512, 0) == bytes(512)


def test_a_stop_is_not_raised_twice(disk: nbd.NBD) -> None:
    with pytest.raises(KeyboardInterrupt):
        disk.pread_structured(512, 0, raiser(KeyboardInterrupt()))
    with pytest.raises(nbd.Error):
        disk.pread(512, MIB)


# the thread in which they run


def test_a_callback_may_use_another_handle(disk: nbd.NBD, nbdkit: StartServer) -> None:
    with nbd.NBD() as other:
        other.connect_unix(nbdkit("memory", "1M").socket)
        other.pwrite(b"other", 0)
        found: list[bytes] = []
        disk.pread_structured(512, 0, lambda *chunk: found.append(bytes(other.pread(5, 0))))
    assert found == [b"other"]


def test_a_callback_may_not_use_its_own_handle(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.pread_structured(512, 0, lambda *chunk: disk.get_size())
    assert isinstance(caught.value.__cause__, nbd.Error)
    assert caught.value.__cause__.errnum == errno.EDEADLK
    assert disk.get_size() == MIB


def test_a_callback_may_not_close_its_own_handle(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.pread_structured(512, 0, lambda *chunk: disk.close())
    assert isinstance(caught.value.__cause__, nbd.Error)
    assert disk.pread(512, 0) == bytes(512)


def test_a_callback_runs_in_the_thread_of_the_call(disk: nbd.NBD) -> None:
    found: list[int] = []
    disk.pread_structured(512, 0, lambda *chunk: found.append(threading.get_ident()))
    assert found == [threading.get_ident()]


def test_a_callback_may_collect_garbage(disk: nbd.NBD) -> None:
    for _ in range(3):
        disk.aio_pread(bytearray(512), 0, lambda error: gc.collect() and 1)
    drain(disk)


def test_a_callback_may_change_its_arguments(disk: nbd.NBD) -> None:
    def extent(context: str, offset: int, entries: list[int], error: Any) -> int:
        entries.clear()
        return 0

    disk.block_status(MIB, 0, extent)
    assert disk.aio_is_ready()


def test_a_stashed_error_outlives_its_callback(disk: nbd.NBD) -> None:
    stashed: list[Any] = []
    disk.pread_structured(512, 0, lambda *chunk: stashed.append(chunk[-1]))
    stashed[0].value = errno.EIO
    assert stashed[0].value == errno.EIO
    assert disk.pread(512, 0) == bytes(512)


def test_the_completion_of_an_option_can_raise(opt: nbd.NBD, unraisable: list[Any]) -> None:
    raised = ValueError("mine")
    opt.aio_opt_info(raiser(raised))
    run_until(opt, lambda: bool(unraisable))
    assert unraisable == [raised]
