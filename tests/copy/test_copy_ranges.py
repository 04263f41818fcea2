# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy with ranges: exactly these bytes are copied, each to the offset that it has."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from support import servers
from support.forms import SOAK
from support.images import Ranges, covered, overlaid, random_ranges, runs, write_sparse
from support.logs import Logged
from support.servers import StartServer
from support.sizes import KIB, MIB

import nbd

SEEDS = 50 if SOAK else 8  # for each kind of source and target
SIZE = 640 * KIB
BEFORE = 100  # bytes before the position of a file object
BLOCKS = ("blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
CONTEXT = "qemu:dirty-bitmap:"
DIRTY = 1  # the flag of an extent in the context of a dirty bitmap


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of data."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture
def old(tmp_path: Path, image: Path) -> Path:
    """Return a file of the same size with other content."""
    path = tmp_path / "old"
    path.write_bytes(b"\xff" * SIZE)
    return path


def served(nbdkit: StartServer, path: Path, *options: str) -> str:
    """Return the URI of an nbdkit on a file."""
    return nbdkit("--threads=4", *options, "file", str(path)).uri


def in_blocks(nbdkit: StartServer, path: Path) -> str:
    """Return the URI of an nbdkit on a file, which refuses anything but whole blocks of 4 KiB."""
    return nbdkit(
        "--threads=4", "--filter=blocksize-policy", "file", str(path), *BLOCKS
    ).uri  # fmt: skip


def check(path: Path, old: bytes, image: Path, ranges: Ranges) -> None:
    """Compare a file with its old content and the ranges of the image."""
    assert path.read_bytes() == overlaid(old, image.read_bytes(), ranges)


# Which bytes are copied.


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, SIZE)],
        [(4096, 8192)],
        [(1, 1)],
        [(SIZE - 1, 1)],
        [(100, 5000), (70_001, 3), (300_000, 100_000)],
        [(300_000, 100_000), (100, 5000), (70_001, 3)],  # not sorted
        [(0, 10_000), (5000, 10_000)],  # overlapping
        [(0, 100_000), (4096, 4096)],  # one within another
        [(5000, 5000), (5000, 5000), (5000, 100)],
        [(0, 4096), (4096, 4096), (8192, 1)],  # touching
        [(8192, 100), (4096, 4096), (0, 4096)],
        [(0, 0), (5000, 0), (SIZE, 0), (9000, 10)],  # empty ones
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["disk", "blocks", "path", "file object"])
def test_exactly_these_bytes_are_copied(
    nbdkit: StartServer, image: Path, old: Path, kind: str, ranges: Ranges
) -> None:
    source = served(nbdkit, image)
    before = old.read_bytes()
    with old.open("r+b") as file:
        target: Any = {"path": old, "file object": file}.get(kind)
        if target is None:
            target = in_blocks(nbdkit, old) if kind == "blocks" else served(nbdkit, old)
        result = nbd.copy(source, target, ranges=ranges)
    assert sum(result) == covered(ranges)
    check(old, before, image, ranges)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 10_000), (5000, 10_000)],
        [(5000, 10_000), (0, 10_000), (0, 15_000), (0, 1)],
        [(0, 5000), (5000, 5000), (10_000, 5000)],
    ],
    ids=str,
)
def test_each_byte_is_read_and_written_once(
    nbdkit: StartServer, image: Path, old: Path, ranges: Ranges
) -> None:
    result = nbd.copy(served(nbdkit, image), served(nbdkit, old), ranges=ranges)
    assert (result, result.read, result.written) == ((15_000, 0), 15_000, 15_000)


def test_only_the_ranges_are_requested(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    logs = [tmp_path / "source.log", tmp_path / "target.log"]
    source = nbdkit("--filter=log", "file", str(image), f"logfile={logs[0]}").uri
    target = nbdkit("--filter=log", "memory", "1M", f"logfile={logs[1]}").uri
    nbd.copy(source, target, ranges=[(8192, 4096)])
    for log, command in zip(logs, (" Read id=", " Write id=")):
        (line,) = [line for line in log.read_text().splitlines() if command in line]
        assert "offset=0x2000 count=0x1000" in line


def test_extents_are_ranges(nbdkit: StartServer, image: Path, old: Path) -> None:
    before = old.read_bytes()
    extents = [nbd.Extent(4096, 100, 1), nbd.Extent(100_000, 3, 0)]
    nbd.copy(served(nbdkit, image), old, ranges=extents)
    check(old, before, image, [(4096, 100), (100_000, 3)])


@pytest.mark.parametrize("is_list", [True, False])
def test_extents_of_the_same_handle_are_ranges(
    nbdkit: StartServer, old: Path, tmp_path: Path, is_list: bool
) -> None:
    image = tmp_path / "sparse"
    with image.open("wb") as file:
        file.truncate(SIZE)
        for start in (0, 256 * KIB, 512 * KIB):
            file.seek(start)
            file.write(b"x" * 64 * KIB)
    before = old.read_bytes()
    with nbd.connect(served(nbdkit, image)) as h:
        extents = (e for e in nbd.extents(h) if not e.flags & nbd.STATE_ZERO)
        result = nbd.copy(h, old, ranges=list(extents) if is_list else extents)
        assert h.pread(1, 0) == b"x"
    ranges = [(start, 64 * KIB) for start in (0, 256 * KIB, 512 * KIB)]
    assert result == (192 * KIB, 0)
    check(old, before, image, ranges)


def test_a_generator_is_used_once(nbdkit: StartServer, image: Path, old: Path) -> None:
    before = old.read_bytes()
    made: list[int] = []

    def ranges() -> Iterator[tuple[int, int]]:
        for start in (9000, 0, 5000):
            made.append(start)
            yield start, 1000

    assert nbd.copy(served(nbdkit, image), old, ranges=ranges()) == (3000, 0)
    assert made == [9000, 0, 5000]
    check(old, before, image, [(0, 1000), (5000, 1000), (9000, 1000)])


def test_an_exception_of_a_generator_is_raised_before_anything_is_done(
    image: Path, tmp_path: Path
) -> None:
    def ranges() -> Iterator[tuple[int, int]]:
        yield 0, 1000
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        nbd.copy(image, tmp_path / "target", ranges=ranges())
    assert not (tmp_path / "target").exists()


def test_many_small_ranges_are_copied(nbdkit: StartServer, image: Path, old: Path) -> None:
    before = old.read_bytes()
    ranges = [(start, 37) for start in range(0, SIZE - 40, 80)]
    random.Random(1).shuffle(ranges)
    assert sum(nbd.copy(served(nbdkit, image), old, ranges=ranges)) == 37 * len(ranges)
    check(old, before, image, ranges)


# Ranges that are refused.


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(-1, 10)], ValueError),
        ([(0, 10), (10, -1)], ValueError),
        ([(-(2**70), 1)], ValueError),
        ([(0, 1, 2, 3), (5, -(2**64))], ValueError),
        (5, TypeError),
        (True, TypeError),
        ([5], TypeError),
        ([None], TypeError),
        ([(0, None)], TypeError),
        ([(0.0, 10)], TypeError),
        ([(0, 10.5)], TypeError),
        ([("0", 10)], TypeError),
    ],
    ids=repr,
)
def test_a_wrong_range_is_refused_before_anything_is_opened(
    image: Path, tmp_path: Path, ranges: Any, expected: type[Exception]
) -> None:
    with pytest.raises(expected, match="range"):
        nbd.copy(image, tmp_path / "target", ranges=ranges)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("wrong", [[()], [(5,)], ["ab"], "ab", b"ab", (0, 4096)], ids=repr)
def test_a_range_of_the_wrong_shape_is_refused(image: Path, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="range"):
        nbd.copy(image, tmp_path / "target", ranges=wrong)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "past",
    [(0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2), (SIZE + MIB, 4096), (0, 2**63), (2**63 - 1, 1),
     (2**64, 1), (1, 2**64 - 1), (0, 10**30)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("source_kind", ["disk", "path", "file object"])
@pytest.mark.parametrize("target_kind", ["disk", "path"])
def test_a_range_past_the_end_is_refused_before_anything_is_written(
    nbdkit: StartServer,
    image: Path,
    tmp_path: Path,
    source_kind: str,
    target_kind: str,
    past: tuple[int, int],
) -> None:
    target = tmp_path / "larger"
    target.write_bytes(b"\xff" * MIB)
    with image.open("rb") as file:
        source: Any = {"path": image, "file object": file}.get(source_kind)
        where = served(nbdkit, target) if target_kind == "disk" else target
        with pytest.raises(ValueError, match=str(SIZE)):
            nbd.copy(source or served(nbdkit, image), where, ranges=[(0, 4096), past])
    assert target.read_bytes() == b"\xff" * MIB


@contextmanager
def a_stream(kind: str) -> Iterator[Any]:
    """Open an object that has no offsets."""
    if kind == "BytesIO":
        yield io.BytesIO(bytes(SIZE))
        return
    read, write = os.pipe()
    with open(read, "rb", 0) as source, open(write, "wb", 0) as target:
        yield source if kind == "pipe to read" else target


@pytest.mark.parametrize("ranges", [[(0, 10)], []], ids=str)
@pytest.mark.parametrize("kind", ["BytesIO", "pipe to read"])
def test_a_stream_has_no_ranges_to_read(
    tmp_path: Path, old: Path, kind: str, ranges: Ranges
) -> None:
    with a_stream(kind) as source, pytest.raises(ValueError, match=r"stream|in order"):
        nbd.copy(source, old, ranges=ranges)
    assert old.read_bytes() == b"\xff" * SIZE


@pytest.mark.parametrize("kind", ["BytesIO", "pipe to write", "appending"])
def test_a_stream_has_no_ranges_to_write(image: Path, old: Path, kind: str) -> None:
    with ExitStack() as stack:
        if kind == "appending":
            target: Any = stack.enter_context(old.open("ab"))
        else:
            target = stack.enter_context(a_stream(kind))
        with pytest.raises(ValueError, match=r"stream|in order"):
            nbd.copy(image, target, ranges=[(0, 10)])
        if kind == "BytesIO":
            assert target.getvalue() == bytes(SIZE)
    assert old.read_bytes() == b"\xff" * SIZE


def test_a_file_is_not_copied_to_itself_in_part(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(ValueError, match="same file"):
        nbd.copy(image, image, ranges=[(0, 4096)])
    assert image.read_bytes() == before


# The size of the target.


@pytest.mark.parametrize("ranges", [[], [(0, 0)], [(5000, 0), (9, 0)]], ids=str)
def test_no_ranges_copy_nothing(
    nbdkit: StartServer, image: Path, old: Path, ranges: Ranges
) -> None:
    calls: list[Any] = []
    for target in (old, served(nbdkit, old)):
        calls.clear()
        result = nbd.copy(
            served(nbdkit, image), target, ranges=ranges, progress=lambda *call: calls.append(call)
        )
        assert (result, result.read, result.written, result.bad) == ((0, 0), 0, 0, ())
        assert calls[-1] == (0, 0)
    assert old.read_bytes() == b"\xff" * SIZE


@pytest.mark.parametrize("ranges", [[], [(5000, 100)]], ids=str)
def test_a_path_that_is_new_has_the_size_of_the_source(
    nbdkit: StartServer, image: Path, tmp_path: Path, ranges: Ranges
) -> None:
    for number, source in enumerate((image, served(nbdkit, image))):
        target = tmp_path / f"new {number}"
        nbd.copy(source, target, ranges=ranges)
        check(target, b"", image, ranges)


@pytest.mark.parametrize("size", [0, 1, 4097, 300_000])
@pytest.mark.parametrize("ranges", [[], [(5000, 100)], [(SIZE - 10, 10)]], ids=str)
def test_a_path_that_is_shorter_is_grown(
    image: Path, tmp_path: Path, size: int, ranges: Ranges
) -> None:
    target = tmp_path / "shorter"
    target.write_bytes(b"\xff" * size)
    nbd.copy(image, target, ranges=ranges)
    check(target, b"\xff" * size, image, ranges)


def test_a_path_that_is_longer_keeps_its_size(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer"
    target.write_bytes(b"\xff" * 2 * MIB)
    nbd.copy(image, target, ranges=[(5000, 100)])
    check(target, b"\xff" * 2 * MIB, image, [(5000, 100)])


@pytest.mark.parametrize("size", [0, 5000, 2 * MIB])
def test_zeroes_of_the_source_replace_old_data_of_a_path(tmp_path: Path, size: int) -> None:
    image, target = tmp_path / "zeroes", tmp_path / "target"
    with image.open("wb") as file:
        file.truncate(MIB)  # a hole, then zeroes that are data
        file.seek(512 * KIB)
        file.write(bytes(64 * KIB))
    target.write_bytes(b"\xff" * size)
    ranges = [(1000, 10_000), (512 * KIB + 1000, 10_000)]
    assert nbd.copy(image, target, ranges=ranges) == (0, 20_000)
    check(target, b"\xff" * size, image, ranges)


def test_a_disk_only_has_to_reach_to_the_last_range(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"\xff" * 64 * KIB)
    uri = served(nbdkit, small)
    nbd.copy(image, uri, ranges=[(60 * KIB, 4 * KIB), (100, 100)])
    expected = overlaid(b"\xff" * 64 * KIB, image.read_bytes()[: 64 * KIB], [(100, 100)])
    assert small.read_bytes() == expected[: 60 * KIB] + image.read_bytes()[60 * KIB : 64 * KIB]


def test_a_disk_that_ends_before_a_range_is_refused_before_anything_is_written(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"\xff" * 64 * KIB)
    with pytest.raises(nbd.Error, match="the target has 65536 bytes") as refused:
        nbd.copy(image, served(nbdkit, small), ranges=[(0, 4096), (64 * KIB - 1, 2)])
    assert refused.value.errno == "ENOSPC"
    assert small.read_bytes() == b"\xff" * 64 * KIB


# Unaligned ranges.


@pytest.mark.parametrize("sparse", [True, False, 512])
@pytest.mark.parametrize("is_zero", [True, False])
def test_edges_of_blocks_keep_what_surrounds_a_range(
    nbdkit: StartServer, tmp_path: Path, is_zero: bool, sparse: int
) -> None:
    image, target = tmp_path / "image", tmp_path / "target"
    image.write_bytes(bytes(SIZE) if is_zero else random.Random(1).randbytes(SIZE))
    ranges = [(1, 1), (4095, 2), (10_000, 10_000), (50_000, 4096), (SIZE - 1, 1)]
    for source in (served(nbdkit, image), in_blocks(nbdkit, image), image):
        target.write_bytes(b"\xff" * SIZE)
        result = nbd.copy(source, in_blocks(nbdkit, target), ranges=ranges, sparse=sparse)
        assert sum(result) == covered(ranges)
        check(target, b"\xff" * SIZE, image, ranges)


@pytest.mark.parametrize("target_kind", ["disk", "path"])
def test_a_source_of_large_blocks_is_read_in_part(
    nbdkit: StartServer, image: Path, old: Path, target_kind: str
) -> None:
    before = old.read_bytes()
    ranges = [(1, 1), (4095, 2), (10_000, 10_000), (SIZE - 1, 1)]
    target = served(nbdkit, old) if target_kind == "disk" else old
    assert sum(nbd.copy(in_blocks(nbdkit, image), target, ranges=ranges)) == covered(ranges)
    check(old, before, image, ranges)


def test_only_the_first_request_of_a_range_is_not_aligned(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    source = nbdkit("--threads=4", "--filter=log", "pattern", "32M", f"logfile={log}").uri
    target = nbdkit("--threads=4", "memory", "32M").uri
    start, length = 1000, 20 * MIB
    assert nbd.copy(source, target, ranges=[(start, length)]) == (length, 0)
    reads = re.findall(r" Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log.read_text())
    assert sum(int(count, 16) for _, count in reads) == length
    assert sorted(int(place, 16) % 4096 for place, _ in reads)[:-1] == [0] * (len(reads) - 1)


def test_several_ranges_in_one_block_are_all_copied(
    nbdkit: StartServer, image: Path, old: Path
) -> None:
    before = old.read_bytes()
    ranges = [(start, 5) for start in range(0, 8192, 10)]
    uri = in_blocks(nbdkit, old)
    assert sum(nbd.copy(in_blocks(nbdkit, image), uri, ranges=ranges, depth=16)) == 820 * 5
    check(old, before, image, ranges)


# Random ranges.


class Round:
    """Sources and targets of some kinds, for one copy after the other."""

    def __init__(self, kinds: tuple[str, str], nbdkit: StartServer, folder: Path) -> None:
        self.kinds = kinds
        self.paths = folder / "source", folder / "target"
        self._stack = ExitStack()
        self._uris = []
        for kind, path in zip(kinds, self.paths):
            path.write_bytes(bytes(SIZE))
            filters = [f"--filter={kind}"] if kind in ("noextents", "nozero") else []
            if kind == "blocks":
                self._uris.append(in_blocks(nbdkit, path))
            else:
                self._uris.append(served(nbdkit, path, *filters))

    def copy(self, seed: int) -> None:
        """Copy random ranges, and compare the target with what it should contain."""
        rng = random.Random(seed)
        data = runs(rng, SIZE, rng.choice([512, 4096]))
        before = b"s" * BEFORE if self.kinds[0] == "file object" else b""
        write_sparse(self.paths[0], data, rng, before=before)
        old = self._old(rng)
        ranges = random_ranges(rng, SIZE)
        calls: list[Any] = []
        with ExitStack() as stack:
            result = nbd.copy(
                self._side(0, stack),
                self._side(1, stack),
                ranges=ranges,
                sparse=rng.choice([True, False, 512, 65536]),
                depth=rng.choice([None, 1, 64]),
                connections=rng.choice([None, 1]),
                progress=lambda *call: calls.append(call),
                flush=False,
            )
        assert sum(result) == covered(ranges)
        assert calls == sorted(calls)
        assert calls[-1] == (covered(ranges), covered(ranges))
        if self.kinds[1] == "file object":
            old, before = old[BEFORE:], old[:BEFORE]
        else:
            before = b""
        assert self.paths[1].read_bytes() == before + overlaid(old, data, ranges)

    def _old(self, rng: random.Random) -> bytes:
        """Fill the target with other data; returns this data."""
        path = self.paths[1]
        size = SIZE
        if self.kinds[1] in ("path", "file object"):
            size = rng.choice([0, 1, 5000, SIZE, SIZE + 5000])
        if size == 0:
            path.unlink()
        old = rng.randbytes(size)
        if size or self.kinds[1] == "file object":
            old = old.ljust(BEFORE, b"\xff") if self.kinds[1] == "file object" else old
            path.write_bytes(old)
        return old

    def _side(self, side: int, stack: ExitStack) -> Any:
        kind, path = self.kinds[side], self.paths[side]
        if kind == "path":
            return path
        if kind == "file object":
            file = stack.enter_context(path.open("r+b"))
            file.seek(BEFORE)
            return file
        return self._uris[side]


@pytest.mark.parametrize("target_kind", ["disk", "nozero", "blocks", "path", "file object"])
@pytest.mark.parametrize("source_kind", ["disk", "noextents", "blocks", "path", "file object"])
def test_random_ranges_are_copied_exactly(
    nbdkit: StartServer, tmp_path: Path, source_kind: str, target_kind: str
) -> None:
    rounds = Round((source_kind, target_kind), nbdkit, tmp_path)
    for seed in range(SEEDS):
        rounds.copy(seed)


def test_several_connections_share_the_ranges(
    nbdkit: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbd._disks import copy as copying

    monkeypatch.setattr(copying, "_MIN_RANGE", 256 * KIB)
    monkeypatch.setattr(copying, "processors", lambda: 3)
    image, target = tmp_path / "image", tmp_path / "target"
    rng = random.Random(2)
    data, size = rng.randbytes(8 * MIB), 8 * MIB
    image.write_bytes(data)
    target.write_bytes(b"\xff" * size)
    ranges = [(rng.randrange(size - 100_000), rng.randrange(100_000)) for _ in range(100)]
    calls: list[int] = []
    result = nbd.copy(
        nbdkit("--threads=8", "--filter=delay", "file", str(image), "rdelay=1ms").uri,
        nbdkit("--threads=8", "file", str(target)).uri,
        ranges=ranges,
        connections=3,
        progress=lambda done, total: calls.append(done),
    )
    assert sum(result) == covered(ranges) == calls[-1]
    assert calls == sorted(calls)
    check(target, b"\xff" * size, image, ranges)


# With the other arguments.


def test_bad_ranges_are_found_within_the_ranges(
    nbdkit: StartServer, image: Path, old: Path, tmp_path: Path
) -> None:
    mapfile = tmp_path / "map"
    mapfile.write_text(
        "0x0 +\n0x0 0x1000 -\n0x1000 0x17000 +\n0x18000 0x1000 -\n0x19000 0x87000 +\n"
    )
    before = old.read_bytes()
    uri = nbdkit("--filter=ddrescue", "file", str(image), f"ddrescue-mapfile={mapfile}").uri
    ranges = [(0x1000, 0x2000), (0x17000, 0x1800), (0x20000, 0x1000)]
    result = nbd.copy(uri, old, ranges=ranges, on_error=lambda *failed: True)
    assert result.bad == ((0x18000, 0x800),)
    assert result == (0x4000, 0x800)
    content = bytearray(overlaid(before, image.read_bytes(), ranges))
    content[0x18000:0x18800] = bytes(0x800)
    assert old.read_bytes() == content


def test_a_failed_read_in_a_range_names_its_offset(
    nbdkit: StartServer, image: Path, old: Path
) -> None:
    bad = nbdkit("--filter=error", "file", str(image), "error=EIO", "error-pread-rate=100%").uri
    with pytest.raises(nbd.Error, match="reading the source failed at offset 8192: "):
        nbd.copy(bad, old, ranges=[(8192, 512)])


@pytest.mark.parametrize(
    ("ranges", "end"), [([(9000, 1000), (100, 10)], 10_000), ([(SIZE, 0)], 0), ([], 0)], ids=str
)
def test_the_position_of_a_file_is_behind_the_last_range(
    nbdkit: StartServer, image: Path, old: Path, ranges: Ranges, end: int
) -> None:
    with image.open("rb") as source:
        nbd.copy(source, served(nbdkit, old), ranges=ranges)
        assert source.tell() == end
    with old.open("r+b") as target:
        target.seek(17)
        nbd.copy(image, target, ranges=ranges)
        assert target.tell() == 17 + end


def test_a_file_object_that_could_not_be_copied_stays_where_it_was(
    nbdkit: StartServer, image: Path, old: Path
) -> None:
    bad = nbdkit("--filter=error", "file", str(image), "error=EIO", "error-pread-rate=100%").uri
    with old.open("r+b") as target:
        target.seek(17)
        with pytest.raises(nbd.Error):
            nbd.copy(bad, target, ranges=[(8192, 512)])
        assert target.tell() == 17


def test_a_target_that_is_zero_is_not_sent_the_zeroes_of_a_range(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    log, image = tmp_path / "log", tmp_path / "image"
    image.write_bytes(bytes(MIB))
    uri = nbdkit("--filter=log", "memory", "1M", f"logfile={log}").uri
    result = nbd.copy(
        served(nbdkit, image, "--filter=noextents"), uri, ranges=[(100, MIB - 200)],
        target_is_zero=True,
    )  # fmt: skip
    assert (result, result.read, result.written) == ((0, MIB - 200), MIB - 200, 0)
    text = log.read_text()
    assert (" Write " in text, " Zero " in text) == (False, False)


# Incremental backups.


class Qcow2:
    """A qcow2 disk with dirty bitmaps, which is written and read while no other server has it."""

    def __init__(self, path: Path, qemu_nbd: StartServer) -> None:
        self.path = path
        self._qemu_nbd = qemu_nbd
        servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(8 * MIB))

    def bitmap(self, action: str, name: str) -> None:
        """Add, remove or clear a bitmap."""
        servers.run("qemu-img", "bitmap", f"--{action}", str(self.path), name)

    @contextmanager
    def connected(self, *bitmaps: str) -> Iterator[tuple[str, nbd.NBD]]:
        """Serve the disk, connect to it, and have the server store its bitmaps at the end."""
        server = self._qemu_nbd(self.path, "--format=qcow2", *(f"--bitmap={b}" for b in bitmaps))
        contexts = ["base:allocation", *(CONTEXT + name for name in bitmaps)]
        with nbd.connect(server.uri, contexts=contexts) as h:
            yield server.uri, h
            h.shutdown()
        assert server.stop() == 0

    def write(self, rng: random.Random) -> None:
        """Write data and zeroes to random places."""
        with self.connected() as (_, h):
            for _ in range(10):
                length = rng.choice([1, 512, 5000, 100_000])
                offset = rng.randrange(8 * MIB - length)
                if rng.random() < 0.7:
                    h.pwrite(rng.randbytes(length), offset)
                else:
                    h.zero(length, offset)

    def is_equal(self, backup: Path) -> bool:
        """Return whether qemu-img finds no difference between the disk and a raw file."""
        said = servers.run(
            "qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(self.path), str(backup)
        )
        return "identical" in said


def dirty(h: nbd.NBD, name: str) -> list[nbd.Extent]:
    """Return what was written since a bitmap was added."""
    return [extent for extent in nbd.extents(h, CONTEXT + name) if extent.flags & DIRTY]


def test_the_holes_of_ranges_far_apart_are_asked_for_together(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    server = Logged(nbdkit, tmp_path / "log", "memory", "8G")
    ranges = [(offset, 64 * KIB) for offset in range(0, 8 << 30, 64 * MIB)]
    assert nbd.copy(server.uri, None, ranges=ranges) == (0, len(ranges) * 64 * KIB)
    assert len(server.lines("Extents")) <= len(ranges) // 8


@pytest.mark.parametrize("kind", ["path", "disk"])
def test_incremental_backups_are_equal_to_the_disk(
    nbdkit: StartServer, qemu_nbd: StartServer, tmp_path: Path, kind: str
) -> None:
    rng = random.Random(kind)
    disk, backup = Qcow2(tmp_path / "disk", qemu_nbd), tmp_path / "backup"
    target: Callable[[], Any] = lambda: backup  # noqa: E731
    if kind == "disk":
        backup.write_bytes(b"\xff" * 8 * MIB)
        uri = nbdkit("--threads=4", "file", str(backup)).uri
        target = lambda: uri  # noqa: E731
    disk.write(rng)
    disk.bitmap("add", "even")
    with disk.connected() as (source, _):
        assert sum(nbd.copy(source, target())) == 8 * MIB
    assert disk.is_equal(backup)
    for number, (last, following) in enumerate((("even", "odd"), ("odd", "even")) * 2):
        if number == 3:
            break
        disk.write(rng)
        disk.bitmap("add", following)
        with disk.connected(last) as (_, h):
            ranges = dirty(h, last)
            result = nbd.copy(h, target(), ranges=ranges)
            assert sum(result) == covered((e.offset, e.length) for e in ranges)
        assert 0 < sum(result) < 4 * MIB
        disk.bitmap("remove", last)
        assert disk.is_equal(backup)


def test_two_bitmaps_keep_two_backups_up_to_date(qemu_nbd: StartServer, tmp_path: Path) -> None:
    rng = random.Random(0)
    disk = Qcow2(tmp_path / "disk", qemu_nbd)
    names = "daily", "weekly"
    backups = {name: tmp_path / name for name in names}
    disk.write(rng)
    with disk.connected() as (source, _):
        for backup in backups.values():
            nbd.copy(source, backup)
    for name in names:
        disk.bitmap("add", name)
    sizes: dict[str, list[int]] = {name: [] for name in names}
    for day in range(3):
        disk.write(rng)
        for name in names if day == 2 else ("daily",):
            with disk.connected(name) as (source, h):
                sizes[name].append(sum(nbd.copy(source, backups[name], ranges=dirty(h, name))))
            disk.bitmap("clear", name)
            assert disk.is_equal(backups[name])
    assert sizes["weekly"][0] > max(sizes["daily"])
