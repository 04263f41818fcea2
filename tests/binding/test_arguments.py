"""Each row of the argument table: what each C type accepts from Python, and what it refuses."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from support.handles import drain, finish, retired
from support.servers import StartServer, program

import nbd

TOO_BIG = (OverflowError, ValueError)
NO_BUFFER = (BufferError, TypeError, ValueError)
WORDS = b"0123456789abcdef" * 32
FILLED = b"\xff" * 1024


class Index:
    """An integer type of another library, such as numpy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Spiteful:
    """An object whose truth value and integer value cannot be taken."""

    def __bool__(self) -> bool:
        raise ZeroDivisionError

    def __index__(self) -> int:
        raise ZeroDivisionError


@pytest.fixture
def registry() -> Any:
    """Return the registry of live callables and buffers."""
    return nbd._binding.callbacks.registry


# bool: any object, converted by its truth value


@pytest.mark.parametrize("value", [True, 1, -1, "no", [0], 0.1, object()])
def test_bool_takes_any_true_object(h: nbd.NBD, value: Any) -> None:
    h.set_full_info(value)
    assert h.get_full_info() is True


@pytest.mark.parametrize("value", [False, 0, None, "", [], 0.0])
def test_bool_takes_any_false_object(h: nbd.NBD, value: Any) -> None:
    h.set_full_info(True)
    h.set_full_info(value)
    assert h.get_full_info() is False


def test_bool_lets_the_exception_of_dunder_bool_out(h: nbd.NBD) -> None:
    with pytest.raises(ZeroDivisionError):
        h.set_full_info(Spiteful())


# const char *: str


@pytest.mark.parametrize(
    "text", ["", "ascii", "größe", "日本", "\U0001f41a", "a\nb", "\udcff\udc80"]
)
def test_str_arrives_and_is_returned(h: nbd.NBD, text: str) -> None:
    h.set_export_name(text)
    assert h.get_export_name() == text


class Text(str):
    """A subclass of str."""


def test_str_may_be_a_subclass(h: nbd.NBD) -> None:
    h.set_export_name(Text("mine"))
    assert h.get_export_name() == "mine"


@pytest.mark.parametrize("text", ["\0", "a\0b", "a\0"])
def test_str_with_nul_is_value_error(h: nbd.NBD, text: str) -> None:
    h.set_export_name("before")
    with pytest.raises(ValueError, match=r"(?i)\bnul\b"):
        h.set_export_name(text)
    assert h.get_export_name() == "before"


def test_str_with_a_surrogate_that_stands_for_no_byte_is_value_error(h: nbd.NBD) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - UnicodeEncodeError is one
        h.set_export_name("\ud800")


@pytest.mark.parametrize("value", [b"bytes", bytearray(b"x"), 1, None, ["x"], Path("x")])
def test_str_refuses_everything_else(h: nbd.NBD, value: Any) -> None:
    with pytest.raises(TypeError):
        h.set_export_name(value)


def test_uri_with_nul_is_value_error(h: nbd.NBD) -> None:
    with pytest.raises(ValueError, match=r"(?i)\bnul\b"):
        h.connect_uri("nbd://localhost\0")


# const char *unixsocket, *dir, *filename: also bytes and os.PathLike


@pytest.mark.parametrize("convert", [str, os.fsencode, Path])
@pytest.mark.parametrize("method", ["connect_unix", "aio_connect_unix"])
def test_unixsocket_takes_every_kind_of_path(
    nbdkit: StartServer, h: nbd.NBD, convert: Callable[[str], Any], method: str
) -> None:
    getattr(h, method)(convert(nbdkit("memory", "1M").socket))
    assert not h.aio_is_created()


@pytest.mark.parametrize("convert", [bytes, os.fsdecode, lambda path: Path(os.fsdecode(path))])
def test_unixsocket_takes_a_path_that_is_not_utf_8(
    h: nbd.NBD, short_path: Path, convert: Callable[[bytes], Any]
) -> None:
    path = os.fsencode(short_path) + b"/\xff\xfe"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        h.aio_connect_unix(convert(path))
        with listener.accept()[0] as reached:
            assert reached.fileno() >= 0


@pytest.mark.parametrize("path", ["/a\0b", b"/a\0b", Path("/a\0b")])
def test_unixsocket_with_nul_is_value_error(h: nbd.NBD, path: Any) -> None:
    with pytest.raises(ValueError, match=r"(?i)\bnul\b"):
        h.connect_unix(path)


@pytest.mark.parametrize("path", [1, None, ["/x"], 1.5])
def test_unixsocket_refuses_everything_else(h: nbd.NBD, path: Any) -> None:
    with pytest.raises(TypeError):
        h.connect_unix(path)


@pytest.mark.parametrize("convert", [str, os.fsencode, Path])
def test_filename_takes_every_kind_of_path(
    nbdkit: StartServer, h: nbd.NBD, psk: Path, convert: Callable[[Path], Any]
) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_username("alice")
    h.set_tls_psk_file(convert(psk))
    h.connect_unix(nbdkit("memory", "1M", tls="require", psk=psk).socket)
    assert h.get_tls_negotiated()


@pytest.mark.parametrize("convert", [str, os.fsencode, Path])
def test_dir_takes_every_kind_of_path(
    nbdkit: StartServer,
    h: nbd.NBD,
    certificates: Path,
    convert: Callable[[Path], Any],
) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(convert(certificates))
    h.set_tls_verify_peer(False)
    h.connect_unix(nbdkit("memory", "1M", tls="require", certificates=certificates).socket)
    assert h.get_tls_negotiated()


# char **: list of str


def test_argv_is_handed_over_word_by_word(h: nbd.NBD) -> None:
    h.connect_command([program("nbdkit"), "-s", "--exit-with-parent", "data", "data= 1 2 3"])
    assert h.get_size() == 3


def test_argv_may_hold_text_that_is_not_utf_8(h: nbd.NBD, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"\xff.img")
    name.write_bytes(WORDS)
    h.connect_command([program("nbdkit"), "-s", "--exit-with-parent", "file", str(name)])
    assert h.pread(512, 0) == WORDS


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param("nbdkit", id="str"),
        pytest.param(None, id="None"),
        pytest.param(1, id="int"),
        pytest.param(["nbdkit", 1], id="list with int"),
        pytest.param(["nbdkit", b"-s"], id="list with bytes"),
        pytest.param(["nbdkit", None], id="list with None"),
    ],
)
def test_argv_refuses_other_objects_than_lists_of_str(h: nbd.NBD, argv: Any) -> None:
    with pytest.raises(TypeError):
        h.connect_command(argv)
    assert h.aio_is_created()


def test_argv_with_nul_is_value_error(h: nbd.NBD) -> None:
    with pytest.raises(ValueError, match=r"(?i)\bnul\b"):
        h.connect_command(["nbdkit", "a\0b"])


def test_argv_that_is_empty_is_einval(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.connect_command([])
    assert caught.value.errnum == errno.EINVAL


# const void *buf, size_t count: any contiguous buffer


def mapped() -> mmap.mmap:
    """Return anonymous memory that holds WORDS."""
    memory = mmap.mmap(-1, len(WORDS))
    memory[:] = WORDS
    return memory


READABLE = [
    pytest.param(lambda: WORDS, id="bytes"),
    pytest.param(lambda: bytearray(WORDS), id="bytearray"),
    pytest.param(lambda: memoryview(WORDS), id="memoryview"),
    pytest.param(lambda: memoryview(b"xx" + WORDS + b"xx")[2:-2], id="slice of a memoryview"),
    pytest.param(lambda: memoryview(WORDS).cast("B", [16, 32]), id="memoryview of two dimensions"),
    pytest.param(lambda: memoryview(WORDS).cast("H"), id="memoryview of uint16"),
    pytest.param(lambda: array.array("B", WORDS), id="array of bytes"),
    pytest.param(lambda: array.array("Q", WORDS), id="array of uint64"),
    pytest.param(lambda: ctypes.create_string_buffer(WORDS, len(WORDS)), id="ctypes"),
    pytest.param(mapped, id="mmap"),
]

WRITABLE = [
    pytest.param(lambda: bytearray(512), id="bytearray"),
    pytest.param(lambda: memoryview(bytearray(516))[2:-2], id="slice of a memoryview"),
    pytest.param(lambda: memoryview(bytearray(512)).cast("B", [16, 32]), id="two dimensions"),
    pytest.param(lambda: array.array("Q", bytes(512)), id="array of uint64"),
    pytest.param(lambda: (ctypes.c_char * 512)(), id="ctypes"),
    pytest.param(lambda: mmap.mmap(-1, 512), id="mmap"),
]

NOT_READABLE = [
    pytest.param("text", id="str"),
    pytest.param(512, id="int"),
    pytest.param(None, id="None"),
    pytest.param([1, 2, 3], id="list"),
    pytest.param(memoryview(bytes(1024))[::2], id="every second byte"),
    pytest.param(memoryview(bytes(512))[::-1], id="backwards"),
]

NOT_WRITABLE = [
    pytest.param(bytes(512), id="bytes"),
    pytest.param(memoryview(bytes(512)), id="read-only memoryview"),
    pytest.param("text", id="str"),
    pytest.param(512, id="int"),
    pytest.param(None, id="None"),
    pytest.param(memoryview(bytearray(1024))[::2], id="every second byte"),
]


@pytest.mark.parametrize("make", READABLE)
def test_pwrite_takes_every_contiguous_buffer(disk: nbd.NBD, make: Callable[[], Any]) -> None:
    disk.pwrite(FILLED, 0)
    disk.pwrite(make(), 0)
    assert disk.pread(1024, 0) == WORDS + FILLED[512:]


@pytest.mark.parametrize("make", READABLE)
def test_aio_pwrite_takes_every_contiguous_buffer(disk: nbd.NBD, make: Callable[[], Any]) -> None:
    disk.pwrite(FILLED, 0)
    finish(disk, disk.aio_pwrite(make(), 0))
    assert disk.pread(1024, 0) == WORDS + FILLED[512:]


@pytest.mark.parametrize("buf", NOT_READABLE)
@pytest.mark.parametrize("method", ["pwrite", "aio_pwrite"])
def test_a_write_refuses_everything_else(
    disk: nbd.NBD, registry: Any, method: str, buf: Any
) -> None:
    before = len(registry)
    with pytest.raises(NO_BUFFER):
        getattr(disk, method)(buf, 0)
    assert (len(registry), disk.aio_in_flight()) == (before, 0)
    assert disk.pread(512, 0) == bytes(512)


@pytest.mark.parametrize("make", WRITABLE)
def test_aio_pread_fills_every_writable_buffer(disk: nbd.NBD, make: Callable[[], Any]) -> None:
    disk.pwrite(WORDS, 0)
    buf = make()
    finish(disk, disk.aio_pread(buf, 0))
    assert bytes(memoryview(buf).cast("B")) == WORDS


@pytest.mark.parametrize("make", WRITABLE)
def test_aio_pread_structured_fills_every_writable_buffer(
    disk: nbd.NBD, make: Callable[[], Any]
) -> None:
    disk.pwrite(WORDS, 0)
    buf = make()
    finish(disk, disk.aio_pread_structured(buf, 0, lambda *chunk: 0))
    assert bytes(memoryview(buf).cast("B")) == WORDS


@pytest.mark.parametrize("buf", NOT_WRITABLE)
def test_aio_pread_refuses_everything_else(disk: nbd.NBD, registry: Any, buf: Any) -> None:
    before = len(registry)
    with pytest.raises(NO_BUFFER):
        disk.aio_pread(buf, 0, lambda error: 1)
    assert (len(registry), disk.aio_in_flight()) == (before, 0)


@pytest.mark.parametrize("buf", NOT_WRITABLE)
def test_aio_pread_structured_refuses_everything_else(
    disk: nbd.NBD, registry: Any, buf: Any
) -> None:
    before = len(registry)
    with pytest.raises(NO_BUFFER):
        disk.aio_pread_structured(buf, 0, lambda *chunk: 0)
    assert (len(registry), disk.aio_in_flight()) == (before, 0)


def test_aio_takes_an_nbd_buffer(disk: nbd.NBD) -> None:
    finish(disk, disk.aio_pwrite(nbd.Buffer.from_bytearray(WORDS), 0))
    buf = nbd.Buffer(512)
    finish(disk, disk.aio_pread(buf, 0))
    assert buf.to_bytearray() == WORDS


def test_an_empty_write_is_refused_by_libnbd(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.pwrite(b"", 0)
    assert caught.value.errnum == errno.EINVAL


def test_an_empty_read_is_refused_by_libnbd(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.pread(0, 0)
    assert caught.value.errnum == errno.EINVAL


@pytest.mark.parametrize("count", [1 << 40, (1 << 63) - 1])
def test_a_read_larger_than_the_address_space_is_an_error(disk: nbd.NBD, count: int) -> None:
    with pytest.raises((nbd.Error, MemoryError, OverflowError)):
        disk.pread(count, 0)
    assert disk.pread(512, 0) == bytes(512)


# integers: the range of the C type; other objects are refused

BITS_32 = [-1, 1 << 32, 1 << 64]
BITS_64 = [-1, 1 << 64, -(1 << 63)]
SIGNED = [1 << 31, -(1 << 31) - 1, 1 << 32, 1 << 64]

RANGES: list[tuple[str, Callable[[nbd.NBD, Any], object], list[int]]] = [
    ("uint32_t flags", lambda h, n: h.set_handshake_flags(n), BITS_32),
    ("uint32_t cid", lambda h, n: h.connect_vsock(n, 1), BITS_32),
    ("uint32_t port", lambda h, n: h.connect_vsock(1, n), BITS_32),
    ("uint32_t mask", lambda h, n: h.set_uri_allow_transports(n), BITS_32),
    ("command flags", lambda h, n: h.flush(n), BITS_32),
    ("command flags of aio", lambda h, n: h.aio_flush(None, n), BITS_32),
    ("uint64_t offset of pread", lambda h, n: h.pread(512, n), BITS_64),
    ("uint64_t offset of pwrite", lambda h, n: h.pwrite(b"x", n), BITS_64),
    ("uint64_t offset of aio_pread", lambda h, n: h.aio_pread(bytearray(1), n), BITS_64),
    ("uint64_t count of trim", lambda h, n: h.trim(n, 0), BITS_64),
    ("uint64_t count of block_status", lambda h, n: h.block_status(n, 0, print), BITS_64),
    ("uint64_t cookie", lambda h, n: h.aio_command_completed(n), BITS_64),
    ("uintptr_t", lambda h, n: h.set_private_data(n), BITS_64),
    ("size_t count of pread", lambda h, n: h.pread(n, 0), BITS_64),
    ("size_t count of pread_structured", lambda h, n: h.pread_structured(n, 0, print), BITS_64),
    ("size_t i", lambda h, n: h.get_meta_context(n), BITS_64),
    ("int tls", lambda h, n: h.set_tls(n), SIGNED),
    ("int sock", lambda h, n: h.connect_socket(n), SIGNED),
    ("int signum", lambda h, n: h.kill_subprocess(n), SIGNED),
    ("int timeout", lambda h, n: h.poll(n), SIGNED),
    ("int size_type", lambda h, n: h.get_block_size(n), SIGNED),
]


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param(call, number, id=f"{name} {number}")
        for name, call, numbers in RANGES
        for number in numbers
    ],
)
def test_an_integer_out_of_range_is_refused(
    h: nbd.NBD, call: Callable[[nbd.NBD, Any], object], number: int
) -> None:
    with pytest.raises(TOO_BIG) as caught:
        call(h, number)
    assert not isinstance(caught.value, nbd.ClosedHandle)


@pytest.mark.parametrize("value", ["1", b"1", 1.0, None, [1]])
@pytest.mark.parametrize("call", [pytest.param(row[1], id=row[0]) for row in RANGES])
def test_an_integer_refuses_everything_else(
    h: nbd.NBD, call: Callable[[nbd.NBD, Any], object], value: Any
) -> None:
    with pytest.raises(TypeError):
        call(h, value)


@pytest.mark.parametrize("value", [3, Index(3)])
def test_an_integer_may_be_any_with_dunder_index(h: nbd.NBD, value: Any) -> None:
    h.set_handshake_flags(value)
    assert h.get_handshake_flags() == 3


def test_an_integer_may_be_a_bool(h: nbd.NBD) -> None:
    h.set_tls(True)
    assert h.get_tls() == 1


def test_a_count_and_an_offset_may_be_any_with_dunder_index(disk: Any) -> None:
    assert disk.pread(Index(512), Index(512)) == bytes(512)


def test_an_integer_lets_the_exception_of_dunder_index_out(h: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        h.set_handshake_flags(Spiteful())


@pytest.mark.parametrize("number", [0, (1 << 64) - 1])
def test_private_data_takes_the_whole_range(h: nbd.NBD, number: int) -> None:
    h.set_private_data(number)
    assert h.get_private_data() == number


def test_an_offset_beyond_the_export_is_an_error_of_libnbd(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.pread(512, (1 << 63) - 512)
    assert caught.value.errnum == errno.EINVAL


def test_a_negative_timeout_of_poll_waits(disk: nbd.NBD) -> None:
    disk.aio_pread(bytearray(512), 0)
    assert disk.poll(-1) == 1


# flags


def test_flags_default_to_none(disk: nbd.NBD) -> None:
    disk.flush()
    disk.pwrite(b"x", 0)
    assert disk.pread(1, 0) == b"x"


def test_flags_may_be_named(disk: nbd.NBD) -> None:
    disk.pwrite(b"x", 0, flags=nbd.CMD_FLAG_FUA)
    assert disk.pread(1, 0) == b"x"


def test_flags_that_libnbd_does_not_know_are_einval(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.pwrite(b"x", 0, 1 << 15)
    assert caught.value.errnum == errno.EINVAL


def test_flags_of_a_setting_are_required(h: Any) -> None:
    with pytest.raises(TypeError):
        h.set_strict_mode()


# closures: a callable, None where it is optional

REQUIRED: list[tuple[str, Callable[[nbd.NBD, Any], object]]] = [
    ("chunk", lambda h, call: h.pread_structured(512, 0, call)),
    ("chunk of aio", lambda h, call: h.aio_pread_structured(bytearray(512), 0, call)),
    ("extent", lambda h, call: h.block_status(512, 0, call)),
    ("extent of aio", lambda h, call: h.aio_block_status(512, 0, call)),
    ("list", lambda h, call: h.opt_list(call)),
    ("list of aio", lambda h, call: h.aio_opt_list(call)),
    ("context", lambda h, call: h.opt_list_meta_context(call)),
    ("context of aio", lambda h, call: h.aio_opt_list_meta_context(call)),
    ("debug", lambda h, call: h.set_debug_callback(call)),
]

OPTIONAL: list[tuple[str, Callable[[nbd.NBD, Any], object]]] = [
    ("aio_pread", lambda h, call: h.aio_pread(bytearray(512), 0, call)),
    ("aio_pread_structured", lambda h, call: h.aio_pread_structured(bytearray(9), 0, print, call)),
    ("aio_pwrite", lambda h, call: h.aio_pwrite(b"x", 0, call)),
    ("aio_flush", lambda h, call: h.aio_flush(call)),
    ("aio_block_status", lambda h, call: h.aio_block_status(512, 0, lambda *e: 0, call)),
    ("aio_trim", lambda h, call: h.aio_trim(512, 0, call)),
]


@pytest.mark.parametrize("value", [None, 42, "print", b"x"])
@pytest.mark.parametrize("call", [pytest.param(row[1], id=row[0]) for row in REQUIRED])
def test_a_required_closure_refuses_what_cannot_be_called(
    disk: nbd.NBD, registry: Any, call: Callable[[nbd.NBD, Any], object], value: Any
) -> None:
    before = len(registry)
    with pytest.raises(TypeError):
        call(disk, value)
    assert (len(registry), disk.aio_in_flight()) == (before, 0)


@pytest.mark.parametrize("value", [42, "print", b"x"])
@pytest.mark.parametrize("call", [pytest.param(row[1], id=row[0]) for row in OPTIONAL])
def test_an_optional_closure_refuses_what_cannot_be_called(
    disk: nbd.NBD, registry: Any, call: Callable[[nbd.NBD, Any], object], value: Any
) -> None:
    before = len(registry)
    with pytest.raises(TypeError):
        call(disk, value)
    assert (len(registry), disk.aio_in_flight()) == (before, 0)


@pytest.mark.parametrize("call", [pytest.param(row[1], id=row[0]) for row in OPTIONAL])
def test_an_optional_closure_may_be_none(
    disk: nbd.NBD, call: Callable[[nbd.NBD, Any], int]
) -> None:
    finish(disk, call(disk, None))
    assert disk.aio_in_flight() == 0


class Retire:
    """Callables of every kind that retire a command."""

    def __call__(self, error: Any) -> int:
        return 1

    def method(self, error: Any) -> int:
        return 1

    @staticmethod
    def static(error: Any) -> int:
        return 1


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param(lambda error: 1, id="lambda"),
        pytest.param(Retire(), id="object"),
        pytest.param(Retire().method, id="method"),
        pytest.param(Retire.static, id="static method"),
        pytest.param(partial(lambda one, error: one, 1), id="partial"),
    ],
)
def test_a_closure_may_be_any_callable(disk: nbd.NBD, completion: Callable[[Any], int]) -> None:
    disk.aio_pread(bytearray(512), 0, completion)
    drain(disk)
    assert retired(disk)


# positional and keyword arguments


def test_arguments_may_be_named(disk: nbd.NBD) -> None:
    disk.pwrite(buf=WORDS, offset=0, flags=0)
    assert disk.pread(offset=0, count=512) == WORDS


@pytest.mark.parametrize("arguments", [(), (512,), (512, 0, 0, 0)])
def test_a_wrong_number_of_arguments_is_type_error(
    disk: nbd.NBD, arguments: tuple[int, ...]
) -> None:
    with pytest.raises(TypeError):
        disk.pread(*arguments)


def test_an_unknown_name_is_type_error(disk: Any) -> None:
    with pytest.raises(TypeError):
        disk.pread(512, 0, timeout=1)
