"""nbd.copy and files: buffers, modes, wrong sizes, and files with methods of their own."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.programs import run_program
from support.servers import StartServer
from support.sizes import MIB

import nbd

# A file system in memory may lack O_DIRECT, as tmpfs did before Linux 6.6.
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 3 MiB and some bytes: data between holes."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(3 * MIB + 1234)
        for start in (0, MIB + 5, 3 * MIB):
            file.seek(start)
            file.write(random.Random(start).randbytes(1234))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a larger file with other content."""
    path = tmp_path / "old"
    path.write_bytes(b"\xff" * 5 * MIB)
    return path


def served(nbdkit: StartServer, path: Path) -> str:
    """Return the URI of an nbdkit on a file."""
    return nbdkit("file", str(path)).uri


# Appending.


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("has_position", [False, True])
def test_what_is_appended_follows_what_was_there(
    nbdkit: StartServer, image: Path, tmp_path: Path, buffering: int, has_position: bool
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before" * 100_000)
    with path.open("ab", buffering) as target:
        if has_position:
            target.seek(3)  # writes are appended nevertheless
        nbd.copy(served(nbdkit, image), target)
        target.write(b"after")
    assert path.read_bytes() == b"before" * 100_000 + image.read_bytes() + b"after"


def test_what_is_appended_follows_what_the_buffer_has(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("a+b") as target:
        target.write(b"before")
        nbd.copy(image, target)
    assert path.read_bytes() == b"before" + image.read_bytes()


def test_a_descriptor_appends_whatever_the_mode_of_its_object(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    with open(fd, "r+b") as target:
        nbd.copy(image, target)
    assert path.read_bytes() == b"before" + image.read_bytes()


def test_standard_output_appends_after_the_shell_has_said_so(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before")
    program = f"import nbd, sys; nbd.copy({str(image)!r}, sys.stdout.buffer)"
    shell = f"exec {sys.executable} -c \"$0\" >> '{path}'"
    subprocess.run(["sh", "-c", shell, program], check=True, cwd=tmp_path)
    assert path.read_bytes() == b"before" + image.read_bytes()


def test_a_file_for_appending_is_a_source_with_holes(image: Path, nbdkit: StartServer) -> None:
    with image.open("a+b") as source:
        source.seek(0)
        assert nbd.copy(source, nbdkit("memory", "4M").uri).zeroed > MIB


# Buffers.


@pytest.mark.parametrize("target", ["disk", "stream"])
def test_what_the_buffer_of_the_source_has_is_copied(
    nbdkit: StartServer, image: Path, tmp_path: Path, target: str
) -> None:
    where: Any = tmp_path / "copy" if target == "disk" else io.BytesIO()
    with image.open("r+b") as source:
        source.read(1)  # within its buffer, seek does not flush
        source.seek(100)
        source.write(b"not flushed")
        source.seek(50)
        nbd.copy(source, where)
        assert source.read() == b""
    expected = image.read_bytes()[50:]
    assert expected[50:61] == b"not flushed"
    assert (where.read_bytes() if isinstance(where, Path) else where.getvalue()) == expected


def test_what_the_buffer_of_the_target_has_comes_first(image: Path, old: Path) -> None:
    with old.open("r+b") as target:
        target.write(b"before")
        nbd.copy(image, target)
        target.write(b"after")
    data = image.read_bytes()
    whole = b"before" + data + b"after"
    assert old.read_bytes() == whole + b"\xff" * (5 * MIB - len(whole))


def test_what_the_target_has_read_before_is_not_read_again(image: Path, old: Path) -> None:
    with old.open("r+b") as target:
        assert target.read(10) == b"\xff" * 10  # the rest is in the buffer
        nbd.copy(image, target)
        target.seek(10)
        assert target.read(1000) == image.read_bytes()[:1000]
        target.seek(0)
        assert target.read(20) == b"\xff" * 10 + image.read_bytes()[:10]


def test_holes_replace_old_data_of_an_open_file(
    nbdkit: StartServer, image: Path, old: Path
) -> None:
    with old.open("r+b", buffering=0) as target:
        target.seek(MIB)
        assert nbd.copy(served(nbdkit, image), target).zeroed > MIB
    data = image.read_bytes()
    assert old.read_bytes() == b"\xff" * MIB + data + b"\xff" * (4 * MIB - len(data))


class Upper(io.BufferedReader):
    """A reader that returns other bytes than its descriptor."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size).upper()


class Counting(io.FileIO):
    """A file with its own write method."""

    written = 0

    def write(self, data: Any, /) -> int:
        self.written += len(data)
        return super().write(data)


def test_the_methods_of_a_subclass_count(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"text" * 1000)
    with Upper(io.FileIO(path)) as source, Counting(tmp_path / "copy", "w") as target:
        nbd.copy(source, target)
    assert (tmp_path / "copy").read_bytes() == b"TEXT" * 1000
    assert target.written == 4000


def test_a_temporary_file_is_used_through_its_wrapper(image: Path) -> None:
    with tempfile.NamedTemporaryFile() as middle, tempfile.SpooledTemporaryFile() as last:
        middle.write(b"x")
        nbd.copy(image, middle)
        middle.seek(0)
        nbd.copy(middle, last)
        last.seek(0)
        assert last.read() == b"x" + image.read_bytes()


def test_a_pair_is_read_and_written_on_its_sides(image: Path, tmp_path: Path) -> None:
    source = io.BufferedRWPair(image.open("rb", 0), (tmp_path / "other").open("wb", 0))
    target = io.BufferedRWPair(image.open("rb", 0), (tmp_path / "copy").open("wb", 0))
    nbd.copy(source, target)
    for pair in (source, target):
        pair.close()
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


class Broken(Exception):
    """An exception that a test raises in the middle of a copy."""


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_copy_that_fails_leaves_the_position_of_a_source(
    image: Path, buffering: int, tmp_path: Path
) -> None:
    def refuse(done: int, total: int | None) -> None:
        raise Broken

    data = image.read_bytes()
    with image.open("rb", buffering) as source:
        assert source.read(10) == data[:10]
        with pytest.raises(Broken):
            nbd.copy(source, tmp_path / "copy", progress=refuse)
        assert source.tell() == 10
        assert source.read() == data[10:]


def test_a_copy_that_fails_leaves_the_position_of_a_target(old: Path, nbdkit: StartServer) -> None:
    bad = nbdkit("--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=1").uri
    with old.open("r+b") as target:
        target.seek(17)
        with pytest.raises(nbd.Error):
            nbd.copy(bad, target, sparse=False)
        assert target.tell() == 17


# Wrong sizes.


@pytest.mark.parametrize("path", ["/proc/version", "/proc/self/mountinfo"])
def test_a_file_without_a_size_is_copied(nbdkit: StartServer, tmp_path: Path, path: str) -> None:
    content = Path(path).read_bytes()
    copied = tmp_path / "copy"
    assert nbd.copy(path, copied) == (len(content), 0)
    assert copied.read_bytes() == content
    with open(path, "rb") as source:
        source.read(10)
        assert nbd.copy(source, nbdkit("memory", "1M").uri) == (len(content) - 10, 0)


def test_a_file_that_is_smaller_than_its_size_is_copied(tmp_path: Path) -> None:
    attribute = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not attribute.exists():
        pytest.skip(f"there is no {attribute}")
    content = attribute.read_bytes()
    assert len(content) < attribute.stat().st_size
    assert nbd.copy(attribute, tmp_path / "copy") == (len(content), 0)
    assert (tmp_path / "copy").read_bytes() == content


def test_an_empty_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert nbd.copy(tmp_path / "empty", tmp_path / "copy") == (0, 0)
    with (tmp_path / "empty").open("rb") as source:
        source.seek(100)
        assert nbd.copy(source, tmp_path / "copy") == (0, 0)


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("kind", ["disk", "stream", "file"])
def test_a_file_that_shrinks_is_an_error(
    nbdkit: StartServer, tmp_path: Path, kind: str, is_sparse: bool
) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(120 * MIB)
        for start in range(0, 120 * MIB, 8 * MIB):  # holes are zeroed faster than reported
            file.seek(start)
            file.write(b"x" * 5 * MIB)

    def shrink(done: int, total: int | None) -> None:
        os.truncate(path, 100)

    class Sink:
        def write(self, data: bytes) -> int:
            return len(data)

    target: Any = Sink() if kind == "stream" else tmp_path / "copy"
    if kind == "disk":
        target = nbdkit("null", "128M").uri
    with pytest.raises(nbd.Error, match="become shorter") as failed:
        nbd.copy(path, target, sparse=is_sparse, progress=shrink)
    assert str(path) in str(failed.value)
    assert "source" in str(failed.value)


def test_the_last_bytes_of_a_file_that_shrinks_are_not_counted(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * (4 * MIB + 100))
    policy = ("blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
    filters = ("--filter=blocksize-policy", "--filter=delay")
    server = nbdkit(*filters, "memory", "5M", *policy, "wdelay=20ms")

    def shrink(done: int, total: int | None) -> None:
        os.truncate(path, 4 * MIB)

    with pytest.raises(nbd.Error, match="become shorter"):
        nbd.copy(path, server.uri, progress=shrink)


# Impossible copies are refused before anything is overwritten.


def test_one_file_under_two_names_is_refused(image: Path, tmp_path: Path) -> None:
    hard, soft = tmp_path / "hard", tmp_path / "soft"
    os.link(image, hard)
    soft.symlink_to(image)
    before = image.read_bytes()
    for other in (hard, soft):
        with pytest.raises(ValueError, match="the same file"):
            nbd.copy(image, other)
    with image.open("rb") as source, image.open("r+b") as target, image.open("ab") as end:
        target.seek(2 * MIB)
        for pair in ((source, target), (image, f"/proc/self/fd/{target.fileno()}"), (image, end)):
            with pytest.raises(ValueError, match="the same file"):
                nbd.copy(*pair)
    assert image.read_bytes() == before


def test_a_file_is_not_unpacked_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(gzip.compress(b"text"))
    with gzip.open(path) as source, pytest.raises(ValueError, match="the same file"):
        nbd.copy(source, path)
    assert gzip.decompress(path.read_bytes()) == b"text"


@pytest.mark.parametrize("side", [0, 1])
def test_a_folder_is_refused_by_its_name(image: Path, tmp_path: Path, side: int) -> None:
    pair = [tmp_path, tmp_path / "copy"] if side == 0 else [image, tmp_path]
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        nbd.copy(*pair)
    assert not (tmp_path / "copy").exists()


def test_a_missing_source_leaves_the_target_alone(old: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        nbd.copy(tmp_path / "missing", old)
    assert old.stat().st_size == 5 * MIB


def test_a_file_of_the_wrong_mode_is_refused_at_once(image: Path, old: Path) -> None:
    with image.open("rb") as source, old.open("rb") as target:
        with pytest.raises(io.UnsupportedOperation, match="target: the file is not writable"):
            nbd.copy(source, target)
        assert source.tell() == 0
    with old.open("ab") as source, pytest.raises(io.UnsupportedOperation, match=r"source: .* 'rb'"):
        nbd.copy(source, image)


def test_a_descriptor_of_the_wrong_mode_is_refused_at_once(image: Path, old: Path) -> None:
    text = "target: the file is not writable"
    fd = os.open(old, os.O_RDONLY)
    with open(fd, "r+b", 0) as target, pytest.raises(io.UnsupportedOperation, match=text):
        nbd.copy(image, target)
    assert old.read_bytes() == b"\xff" * 5 * MIB


def test_a_closed_file_is_refused(image: Path, tmp_path: Path) -> None:
    file = image.open("rb")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        nbd.copy(file, tmp_path / "copy")


@pytest.mark.parametrize("uri", ["NBD+foo:bar", "nbd+foo://bar", "Nbd://", "nbds:"])
def test_a_string_that_begins_like_a_uri_makes_no_file(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(nbd.Error):
        nbd.copy(image, uri)
    with pytest.raises(nbd.Error):
        nbd.copy(uri, tmp_path / "copy")
    assert set(tmp_path.iterdir()) == before


# Errors of the file system.


def test_a_file_that_must_not_grow_is_named(image: Path, tmp_path: Path) -> None:
    program = f"""
import resource, sys
import nbd
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    nbd.copy({str(image)!r}, sys.argv[1])
except OSError as refused:
    print(isinstance(refused, nbd.Error), refused.errno, refused)
"""
    done = run_program(program, str(tmp_path / "copy"))
    assert done.stderr == ""
    assert done.stdout.startswith(f"True {errno.EFBIG} nbd.copy: growing the target ")
    assert repr(str(tmp_path / "copy")) in done.stdout


def test_a_stream_that_is_too_large_for_a_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    program = """
import io, resource, sys
import nbd
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    nbd.copy(io.BytesIO(b"x" * (3 << 20)), sys.argv[1])
except OSError as refused:
    print(isinstance(refused, nbd.Error), refused.errno, refused)
"""
    done = run_program(program, str(tmp_path / "copy"))
    assert done.stdout == (
        f"True {errno.EFBIG} nbd.copy: writing the target {str(tmp_path / 'copy')!r} failed at "
        "offset 1048576: File too large (EFBIG)\n"
    )


def test_a_full_device_is_named(nbdkit: StartServer, image: Path) -> None:
    with open("/dev/full", "wb") as buffered:
        for target in ("/dev/full", buffered):
            with pytest.raises(OSError, match=r"the target failed: .*'/dev/full'") as full:
                nbd.copy(served(nbdkit, image), target)
            assert full.value.errno == errno.ENOSPC
        with suppress(OSError):  # older Pythons keep unwritten data in the buffer
            buffered.close()


@contextmanager
def small_file_system(path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 1 MiB on a folder, if that is permitted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user cannot mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_file_system_is_reported(nbdkit: StartServer, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small") as small:
        for source in (nbdkit("pattern", "8M").uri, io.BytesIO(b"x" * 8 * MIB)):
            with pytest.raises(nbd.Error, match=r"target.*: No space left") as full:
                nbd.copy(source, small / "copy")
            assert full.value.errnum == errno.ENOSPC


# O_DIRECT.


@contextmanager
def direct(path: Path, flags: int, mode: str, buffering: int = 0) -> Iterator[Any]:
    """Open a file with O_DIRECT, bypassing the page cache."""
    try:
        fd = os.open(path, flags | os.O_DIRECT)
    except OSError as reason:
        pytest.skip(f"{path} cannot be opened with O_DIRECT: {reason}")
    with open(fd, mode, buffering) as file:
        yield file


@pytest.mark.parametrize("start", [0, BLOCK, 100])
@pytest.mark.parametrize("target", ["disk", "stream"])
def test_a_source_past_the_cache(
    nbdkit: StartServer, image: Path, tmp_path: Path, start: int, target: str
) -> None:
    where: Any = tmp_path / "copy" if target == "disk" else io.BytesIO()
    with direct(image, os.O_RDONLY, "rb") as source:
        source.seek(start)
        nbd.copy(source, where)
        assert source.tell() == image.stat().st_size
    data = image.read_bytes()[start:]
    assert (where.read_bytes() if isinstance(where, Path) else where.getvalue()) == data


@pytest.mark.parametrize("start", [0, BLOCK, 100])
@pytest.mark.parametrize("source", ["disk", "stream"])
def test_a_target_past_the_cache(
    nbdkit: StartServer, image: Path, old: Path, start: int, source: str
) -> None:
    data = image.read_bytes()
    what = served(nbdkit, image) if source == "disk" else io.BytesIO(data)
    with direct(old, os.O_RDWR, "r+b") as target:
        target.seek(start)
        nbd.copy(what, target)
        assert target.tell() == start + len(data)
    assert old.read_bytes() == b"\xff" * start + data + b"\xff" * (5 * MIB - len(data) - start)


def test_a_target_past_the_cache_that_is_appended_to(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before")
    with direct(path, os.O_WRONLY | os.O_APPEND, "wb") as target:
        nbd.copy(image, target)
    assert path.read_bytes() == b"before" + image.read_bytes()


def test_a_file_past_the_cache_that_cannot_be_opened_again_is_refused(
    image: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *others: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "refused", path)
        return real(path, flags, *others)

    with direct(old, os.O_RDWR, "r+b") as target:
        monkeypatch.setattr(os, "open", refusing)
        with pytest.raises(PermissionError, match=r"target .* open it without O_DIRECT"):
            nbd.copy(image, target)
    assert old.read_bytes() == b"\xff" * 5 * MIB


# Devices.


def test_nothing_is_copied_from_and_to_the_null_device(image: Path, tmp_path: Path) -> None:
    assert nbd.copy("/dev/null", tmp_path / "copy") == (0, 0)
    assert (tmp_path / "copy").read_bytes() == b""
    assert sum(nbd.copy(image, "/dev/null")) == image.stat().st_size


def test_an_endless_device_fills_a_disk(nbdkit: StartServer) -> None:
    uri = nbdkit("memory", "3M").uri
    with nbd.connect(uri) as disk:
        disk.pwrite(b"x" * MIB, MIB)
        with pytest.raises(nbd.Error, match="the source has more") as full:
            nbd.copy("/dev/zero", uri)
        assert full.value.errno == "ENOSPC"
        assert disk.pread(2 * MIB, 0) == bytes(2 * MIB)
