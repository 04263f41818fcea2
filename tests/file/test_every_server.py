# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open, extents, copy and connect with servers that are slow, fail, or lack features."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from support.servers import StartServer
from support.sizes import KIB, MIB

import nbd

SIZE = MIB
DATA, HOLE = 0, nbd.STATE_HOLE | nbd.STATE_ZERO
#: Where the image has data; the rest is a hole.
PARTS = [(start, 64 * KIB) for start in range(0, SIZE, 320 * KIB)]
TIMEOUT = 10  # seconds


#: nbdkit's eval plugin serving a file with only the features that every server has.
READ = "pread=dd if={0} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none"
WRITE = "pwrite=dd of={0} seek=$4 conv=notrunc oflag=seek_bytes status=none"
PLAIN = ("eval", "get_size=stat -c %s {0}", READ, WRITE)
#: The same, with extents of at most 64 KiB, and only one extent in each reply.
ONE_EXTENT = "extents=at=$(( $4 / 65536 * 65536 )); echo $at 65536 $(( at / 65536 % 5 ? 3 : 0 ))"
BLOCKS = (
    "blocksize-minimum=4096",
    "blocksize-preferred=64K",
    "blocksize-maximum=256K",
    "blocksize-error-policy=error",
)

#: Arguments of nbdkit to serve the file {0}.
KINDS: dict[str, tuple[str, ...]] = {
    "slow": ("--filter=delay", "file", "{0}", "rdelay=20ms", "wdelay=20ms"),
    "with blocks": ("--filter=blocksize-policy", "file", "{0}", *BLOCKS),
    "of one connection": ("--filter=multi-conn", "file", "{0}", "multi-conn-mode=disable"),
    "of one command at a time": ("--filter=noparallel", "file", "{0}"),
    "without zero": ("--filter=nozero", "file", "{0}"),
    "without extents": ("--filter=noextents", "file", "{0}"),
    "without structured replies": ("--no-sr", "file", "{0}"),
    "without flush, zero and extents": PLAIN,
    "of one extent at a time": (*PLAIN, ONE_EXTENT),
}

#: The same for servers that fail or die.  The eval plugin's shell is a child of nbdkit.
FAILING: dict[str, tuple[str, ...]] = {
    "fails": ("--filter=error", "file", "{0}", "error=EIO", "error-rate=100%"),
    "dies": (
        "eval",
        "get_size=stat -c %s {0}",
        *(f"{c}=kill -KILL $PPID" for c in ("pread", "pwrite", "zero", "extents")),
    ),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a sparse file."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start, length in PARTS:
            file.seek(start)
            file.write(random.Random(start).randbytes(length))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a file of the same size with other content."""
    path = tmp_path / "old"
    path.write_bytes(b"\xff" * SIZE)
    return path


def serve(nbdkit: StartServer, arguments: tuple[str, ...], path: Path) -> str:
    """Return the URI of an nbdkit on a file."""
    return nbdkit(*(argument.replace("{0}", str(path)) for argument in arguments)).uri


of_every_kind = pytest.mark.parametrize("kind", KINDS)
that_fails = pytest.mark.parametrize("kind", FAILING)


@of_every_kind
def test_a_file_of_a_server_is_read(nbdkit: StartServer, image: Path, kind: str) -> None:
    with nbd.open(serve(nbdkit, KINDS[kind], image), connections=2, timeout=TIMEOUT) as disk:
        assert disk.read() == image.read_bytes()
        disk.seek(PARTS[1][0] + 1)
        assert disk.read(1000) == image.read_bytes()[PARTS[1][0] + 1 :][:1000]


@of_every_kind
def test_a_file_of_a_server_is_written(nbdkit: StartServer, old: Path, kind: str) -> None:
    wanted = bytearray(old.read_bytes())
    with nbd.open(serve(nbdkit, KINDS[kind], old), "r+b", timeout=TIMEOUT) as disk:
        for offset, length in ((0, 5), (4095, 2), (100_000, 300_000), (SIZE - 1, 1)):
            wanted[offset : offset + length] = data = random.Random(offset).randbytes(length)
            disk.seek(offset)
            disk.write(data)
    assert old.read_bytes() == wanted


@of_every_kind
def test_the_extents_of_a_server_cover_its_disk(
    nbdkit: StartServer, image: Path, kind: str
) -> None:
    with nbd.connect(serve(nbdkit, KINDS[kind], image), timeout=TIMEOUT) as h:
        if not h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
            assert kind == "without structured replies"
            with pytest.raises(nbd.Error, match="was not negotiated"):
                nbd.extents(h)
            return
        found = list(nbd.extents(h))
    has_holes = kind not in ("without extents", "without flush, zero and extents")
    starts = [start for start, _ in PARTS] if has_holes else [0]
    assert [one.offset for one in found if one.flags == DATA] == starts
    assert sum(one.length for one in found) == SIZE
    assert all(one.flags != other.flags for one, other in zip(found, found[1:]))


@of_every_kind
def test_a_disk_is_copied_from_a_server(
    nbdkit: StartServer, image: Path, tmp_path: Path, kind: str
) -> None:
    done = nbd.copy(serve(nbdkit, KINDS[kind], image), tmp_path / "copy", timeout=TIMEOUT)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert sum(done) == SIZE


@of_every_kind
def test_a_disk_is_copied_to_a_server(
    nbdkit: StartServer, image: Path, old: Path, kind: str
) -> None:
    nbd.copy(image, serve(nbdkit, KINDS[kind], old), timeout=TIMEOUT)
    assert old.read_bytes() == image.read_bytes()


def test_a_read_only_disk_is_read_and_copied_and_not_written(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    uri = serve(nbdkit, ("--readonly", "file", "{0}"), image)
    with nbd.open(uri) as disk:
        assert disk.read() == image.read_bytes()
    with pytest.raises(nbd.DiskError, match="read-only"):
        nbd.open(uri, "r+b")
    nbd.copy(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    with pytest.raises(nbd.Error, match="the target is read-only"):
        nbd.copy(tmp_path / "copy", uri)


@that_fails
def test_a_server_that_fails_is_an_error_of_the_read(
    nbdkit: StartServer, image: Path, kind: str
) -> None:
    uri = serve(nbdkit, FAILING[kind], image)
    with nbd.open(uri, timeout=TIMEOUT) as disk, pytest.raises(nbd.DiskError):
        disk.read(1)


@that_fails
def test_a_server_that_fails_is_an_error_of_a_write_or_close(
    nbdkit: StartServer, old: Path, kind: str
) -> None:
    disk = nbd.open(serve(nbdkit, FAILING[kind], old), "r+b", timeout=TIMEOUT)
    with pytest.raises(nbd.DiskError), disk:
        disk.write(b"data")
    assert disk.closed


@that_fails
def test_a_server_that_fails_is_an_error_of_its_extents(
    nbdkit: StartServer, image: Path, kind: str
) -> None:
    uri = serve(nbdkit, FAILING[kind], image)
    with nbd.connect(uri, timeout=TIMEOUT) as h, pytest.raises(nbd.Error):
        list(nbd.extents(h))


@that_fails
@pytest.mark.parametrize("is_source", [True, False])
def test_a_server_that_fails_ends_a_copy_and_leaves_nothing(
    nbdkit: StartServer, image: Path, tmp_path: Path, kind: str, is_source: bool
) -> None:
    uri = serve(nbdkit, FAILING[kind], image)
    source, target = (uri, tmp_path / "other") if is_source else (tmp_path / "other", uri)
    (tmp_path / "other").write_bytes(b"x" * SIZE)
    before = threading.active_count()
    with pytest.raises(nbd.Error):
        nbd.copy(source, target, timeout=TIMEOUT)
    assert threading.active_count() == before


def test_a_server_that_dies_in_the_handshake_is_an_error_and_is_not_tried_again(
    nbdkit: StartServer,
) -> None:
    uri = nbdkit("eval", "get_size=kill -KILL $PPID", "pread=exit 1").uri
    begun = time.monotonic()
    with pytest.raises(nbd.Error):
        nbd.connect(uri, retry_for=TIMEOUT, timeout=TIMEOUT)
    assert time.monotonic() - begun < TIMEOUT


def test_a_server_that_refuses_the_export_is_an_error(nbdkit: StartServer) -> None:
    uri = nbdkit("eval", "open=echo EPERM no >&2; exit 1", "get_size=echo 1M", "pread=exit 1").uri
    with pytest.raises(nbd.Error):
        nbd.connect(uri, timeout=TIMEOUT)
