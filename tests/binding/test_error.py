"""nbd.Error: its attributes, text and pickling, and which call's error it reports."""

from __future__ import annotations

import copy
import errno
import pickle
import threading
from typing import Any, Callable

import pytest
from support.servers import StartServer

import nbd

REFUSED = nbd.Error("connect failed", errno.ECONNREFUSED)
MALFORMED = nbd.Error("malformed", 0)


def test_string_is_the_message() -> None:
    assert REFUSED.string == "connect failed"


def test_errnum_is_the_number() -> None:
    assert REFUSED.errnum == errno.ECONNREFUSED


def test_errno_is_the_symbol_of_the_number() -> None:
    assert REFUSED.errno == "ECONNREFUSED"


def test_text_has_message_and_symbol() -> None:
    assert str(REFUSED) == "connect failed (ECONNREFUSED)"


def test_args_are_message_and_number() -> None:
    assert REFUSED.args == ("connect failed", errno.ECONNREFUSED)


def test_errnum_of_an_error_without_number_is_zero() -> None:
    assert MALFORMED.errnum == 0


def test_errno_of_an_error_without_number_is_none() -> None:
    assert MALFORMED.errno is None


def test_text_without_number_is_the_message_alone() -> None:
    assert str(MALFORMED) == "malformed"


def test_errno_of_a_number_that_has_no_symbol_is_none() -> None:
    strange = nbd.Error("strange", 99999)
    assert (strange.errno, str(strange)) == (None, "strange")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_error_survives_pickling(protocol: int) -> None:
    again = pickle.loads(pickle.dumps(REFUSED, protocol))
    assert type(again) is nbd.Error
    assert (again.string, again.errnum, again.args) == (
        REFUSED.string,
        REFUSED.errnum,
        REFUSED.args,
    )


def test_error_survives_copying() -> None:
    assert copy.deepcopy(REFUSED).args == REFUSED.args


class Refused(nbd.Error):
    """An exception of the program."""


@pytest.mark.parametrize(
    "twin",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_an_error_of_a_subclass_has_its_attributes(
    twin: Callable[[Refused], Refused],
) -> None:
    error: Any = Refused("refused", errno.EACCES)
    error.place = "door"
    again: Any = twin(error)
    assert (type(again), again.args) == (Refused, ("refused", errno.EACCES))
    assert (again.place, again.errno) == ("door", "EACCES")


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_a_copy_of_a_closed_handles_error_is_one(
    h: nbd.NBD, twin: Callable[[nbd.ClosedHandle], nbd.ClosedHandle]
) -> None:
    h.close()
    with pytest.raises(nbd.ClosedHandle) as caught:
        h.get_debug()
    again = twin(caught.value)
    assert (type(again), str(again)) == (nbd.ClosedHandle, str(caught.value))


def test_error_names_its_module_as_nbd() -> None:
    assert (nbd.Error.__module__, nbd.Error.__qualname__) == ("nbd", "Error")


def test_error_is_an_exception_and_no_oserror() -> None:
    assert issubclass(nbd.Error, Exception)
    assert not issubclass(nbd.Error, OSError)


def test_repr_shows_the_arguments() -> None:
    assert repr(MALFORMED) == "Error('malformed', 0)"


@pytest.mark.parametrize("args", [(), ("m",), ("m", 5), ("m", 5, None)])
def test_an_error_takes_any_arguments_as_other_exceptions_do(args: tuple[object, ...]) -> None:
    error = nbd.Error(*args)
    assert error.args == args
    assert str(error) == ["", "m", "m (EIO)", "m (EIO)"][len(args)]
    assert error.errnum == (5 if len(args) > 1 else 0)


def test_the_class_itself_can_be_raised() -> None:
    with pytest.raises(nbd.Error) as caught:
        raise nbd.Error
    assert (caught.value.string, caught.value.errno) == ("", None)


def test_closed_handle_is_a_value_error_of_module_nbd() -> None:
    assert issubclass(nbd.ClosedHandle, ValueError)
    assert nbd.ClosedHandle.__module__ == "nbd"


def test_a_call_in_the_wrong_state_reports_function_and_errno(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.pread(512, 0)
    assert caught.value.string.startswith("nbd_pread: ")
    assert caught.value.errno == "ENOTCONN"
    assert str(caught.value).endswith(" (ENOTCONN)")


def test_an_error_of_the_server_keeps_its_errno(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M", "--filter=error", "error-pread=ENOSPC", "error-rate=1")
    h.connect_unix(server.socket)
    with pytest.raises(nbd.Error) as caught:
        h.pread(512, 0)
    assert caught.value.errno == "ENOSPC"


def test_an_error_has_no_cause_if_no_callback_raised(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.get_size()
    assert caught.value.__cause__ is None


def test_each_thread_gets_the_error_of_its_own_call(disk: nbd.NBD) -> None:
    calls: dict[str, Callable[[], object]] = {
        "nbd_pread: ": lambda: disk.pread(512, 1 << 40),
        "nbd_connect_unix: ": lambda: disk.connect_unix("/nowhere"),
        "nbd_get_meta_context: ": lambda: disk.get_meta_context(99),
        "nbd_set_tls: ": lambda: disk.set_tls(99),
    }
    wrong: list[str] = []

    def fail(prefix: str) -> None:
        for _ in range(200):
            try:
                calls[prefix]()
            except nbd.Error as error:
                if not error.string.startswith(prefix):
                    wrong.append(f"{prefix} got {error.string}")
            else:
                wrong.append(f"{prefix} did not fail")

    threads = [threading.Thread(target=fail, args=(prefix,)) for prefix in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
