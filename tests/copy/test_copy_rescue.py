# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy of a disk with unreadable parts: exactly these are reported and lost."""

from __future__ import annotations

import copy
import errno
import pickle
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.servers import StartServer
from support.sizes import KIB, MIB

import nbd
from nbd._disks.fileendpoint import File

Ranges = list[tuple[int, int]]

SECTOR = 4 * KIB
BAD = [(sector * SECTOR, SECTOR) for sector in (5, 77, 200)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 256 sectors."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(0).randbytes(256 * SECTOR))
    return path


def damaged(nbdkit: StartServer, image: Path, bad: Ranges, *options: str) -> str:
    """Return the URI of a disk with unreadable ranges."""
    lines, at, size = ["0x0 +"], 0, image.stat().st_size
    for start, length in [*bad, (size, 0)]:
        if start > at:
            lines.append(f"{at:#x} {start - at:#x} +")
        if length:
            lines.append(f"{start:#x} {length:#x} -")
        at = start + length
    mapfile = image.with_suffix(".map")
    mapfile.write_text("\n".join(lines) + "\n")
    filters = [one for one in options if one.startswith("--")]
    rest = [one for one in options if not one.startswith("--")]
    return nbdkit(
        "--threads=8", *filters, "--filter=ddrescue", "file", str(image), *rest,
        f"ddrescue-mapfile={mapfile}",
    ).uri  # fmt: skip


def with_zeroes(image: Path, bad: Ranges) -> bytes:
    """Return an image with zeroes in the unreadable ranges."""
    data = bytearray(image.read_bytes())
    for start, length in bad:
        data[start : start + length] = bytes(length)
    return bytes(data)


class Noted:
    """An on_error that continues, and records its calls."""

    def __init__(self) -> None:
        self.calls: Ranges = []
        self.errors: list[nbd.Error] = []
        self.threads: set[int] = set()

    def __call__(self, offset: int, length: int, error: nbd.Error) -> bool:
        self.calls.append((offset, length))
        self.errors.append(error)
        self.threads.add(threading.get_ident())
        return True


def test_an_error_names_the_bad_range_exactly(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    uri = damaged(nbdkit, image, BAD[1:2])
    with pytest.raises(nbd.Error) as failed:
        nbd.copy(uri, tmp_path / "target")
    assert failed.value.errno == "EIO"
    start, length = BAD[1]
    text = (
        f"reading the source failed at offset {start}: Input/output error ({length} bytes of {uri})"
    )
    assert text in failed.value.string


def test_only_the_bad_sectors_are_lost(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    noted = Noted()
    target = tmp_path / "target"
    result = nbd.copy(damaged(nbdkit, image, BAD), target, on_error=noted)
    assert target.read_bytes() == with_zeroes(image, BAD)
    assert sorted(noted.calls) == BAD
    assert result.bad == tuple(BAD)
    assert result == (253 * SECTOR, 3 * SECTOR)
    assert noted.threads == {threading.get_ident()}
    assert {error.errno for error in noted.errors} == {"EIO"}


def test_a_bad_place_of_a_target_with_old_data_becomes_zeroes(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * (256 * SECTOR))
    uri = nbdkit("file", str(target)).uri
    nbd.copy(damaged(nbdkit, image, BAD), uri, on_error=Noted())
    assert target.read_bytes() == with_zeroes(image, BAD)


def test_a_bad_place_of_an_open_file_becomes_zeroes(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * (257 * SECTOR))
    with target.open("r+b") as file:
        file.seek(100)
        nbd.copy(damaged(nbdkit, image, BAD), file, on_error=Noted())
        assert file.tell() == 100 + 256 * SECTOR
    saved = with_zeroes(image, BAD)
    assert target.read_bytes() == b"\xff" * 100 + saved + b"\xff" * (SECTOR - 100)


@pytest.mark.parametrize("answer", [False, None, 0])
def test_a_false_answer_raises_the_error(
    nbdkit: StartServer, image: Path, tmp_path: Path, answer: object
) -> None:
    seen: list[nbd.Error] = []

    def refuse(offset: int, length: int, error: nbd.Error) -> object:
        seen.append(error)
        return answer

    with pytest.raises(nbd.Error) as failed:
        nbd.copy(damaged(nbdkit, image, BAD), tmp_path / "target", on_error=refuse)
    assert seen == [failed.value]


class Refused(Exception):
    """The exception that a test's on_error raises."""


def test_an_exception_of_on_error_ends_the_copy(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    def refuse(offset: int, length: int, error: nbd.Error) -> bool:
        raise Refused

    with pytest.raises(Refused):
        nbd.copy(damaged(nbdkit, image, BAD), tmp_path / "target", on_error=refuse)


def test_on_error_has_to_be_callable(image: Path, tmp_path: Path) -> None:
    wrong: Any = "continue"
    with pytest.raises(TypeError, match="on_error: a callable or None is needed, not str"):
        nbd.copy(image, tmp_path / "target", on_error=wrong)
    assert not (tmp_path / "target").exists()


def test_blocks_of_the_target_may_be_larger_than_bad_sectors(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * (256 * SECTOR))
    uri = nbdkit(
        "--filter=blocksize-policy", "file", str(target),
        "blocksize-minimum=32K", "blocksize-preferred=32K", "blocksize-maximum=32M",
        "blocksize-error-policy=error",
    ).uri  # fmt: skip
    bad = [(10 * KIB, 512), (64 * KIB, 1 * KIB), (256 * KIB - 512, 512)]
    assert nbd.copy(damaged(nbdkit, image, bad), uri, on_error=Noted()).bad == tuple(bad)
    assert target.read_bytes() == with_zeroes(image, bad)


def test_no_smaller_part_is_read_than_the_minimum_block_size(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    uri = damaged(
        nbdkit, image, [(10 * KIB, 512)], "--filter=blocksize-policy",
        "blocksize-minimum=8K", "blocksize-preferred=8K", "blocksize-maximum=32M",
        "blocksize-error-policy=error",
    )  # fmt: skip
    result = nbd.copy(uri, tmp_path / "target", on_error=Noted())
    assert result.bad == ((8 * KIB, 8 * KIB),)


def test_bad_ranges_that_touch_are_returned_as_one(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    bad = [(128 * KIB, 512 * KIB)]  # more than one command
    target = tmp_path / "target"
    assert nbd.copy(damaged(nbdkit, image, bad), target, on_error=Noted()).bad == tuple(bad)
    assert target.read_bytes() == with_zeroes(image, bad)


def test_errors_that_do_not_last_lose_nothing(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    noted = Noted()
    target = tmp_path / "target"
    uri = nbdkit(
        "--filter=error", "file", str(image), "error=EIO", "error-pread-rate=100%",
        f"error-pread-file={tmp_path / 'trigger'}",
    ).uri  # fmt: skip
    (tmp_path / "trigger").touch()

    def mend(offset: int, length: int, error: nbd.Error) -> bool:
        (tmp_path / "trigger").unlink(missing_ok=True)
        return noted(offset, length, error)

    result = nbd.copy(uri, target, on_error=mend)
    assert sum(length for _, length in result.bad) < 256 * SECTOR
    assert target.read_bytes() == with_zeroes(image, list(result.bad))


def test_several_connections_save_the_same(
    nbdkit: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbd._disks import copy as copying

    monkeypatch.setattr(copying, "_MIN_RANGE", 256 * KIB)
    monkeypatch.setattr(copying, "processors", lambda: 3)
    image, target = tmp_path / "image", tmp_path / "target"
    chosen = random.Random(1)
    image.write_bytes(chosen.randbytes(8 * MIB))
    sectors = sorted(chosen.sample(range(0, 2048, 2), 40))
    bad = [(sector * SECTOR, SECTOR) for sector in sectors]
    noted = Noted()
    progress: list[int] = []
    result = nbd.copy(
        damaged(nbdkit, image, bad, "--filter=delay", "rdelay=1ms"),
        target,
        connections=3,
        on_error=noted,
        progress=lambda done, total: progress.append(done),
    )
    assert result.bad == tuple(bad)
    assert sum(result) == 8 * MIB
    assert target.read_bytes() == with_zeroes(image, bad)
    assert noted.threads == {threading.get_ident()}
    assert progress == sorted(progress)
    assert progress[-1] == 8 * MIB


def test_a_lost_connection_is_not_a_bad_sector(nbdkit: StartServer, tmp_path: Path) -> None:
    source = nbdkit("--filter=delay", "memory", "64M", "rdelay=5ms")
    noted = Noted()

    def kill(done: int, total: int | None) -> None:
        source.kill()

    with pytest.raises(nbd.Error, match="source failed"):
        nbd.copy(source.uri, tmp_path / "target", sparse=False, progress=kill, on_error=noted)
    assert noted.calls == []


def test_a_failed_write_is_not_a_bad_sector(nbdkit: StartServer, image: Path) -> None:
    noted = Noted()
    bad = nbdkit("--filter=error", "memory", "6M", "error=EIO", "error-pwrite-rate=100%").uri
    with pytest.raises(nbd.Error, match="writing to the target failed at offset"):
        nbd.copy(image, bad, on_error=noted)
    assert noted.calls == []


class Damaged(File):
    """A file that has bad sectors."""

    def __init__(self, data: bytes, bad: Ranges, settings: Any) -> None:
        self.name = "a file"
        self.settings = settings
        self._data = data
        self._bad = bad
        self.fd = 0

    def check_size(self, stop: int) -> None:
        """Accept the file: it has not become shorter."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read, or fail in a bad sector."""
        stop = offset + len(view)
        if any(start < stop and offset < start + length for start, length in self._bad):
            raise OSError(errno.EIO, "bad")
        view[:] = self._data[offset:stop]


def test_a_file_is_read_around_its_bad_sectors(image: Path) -> None:
    noted = Noted()
    settings: Any = SimpleNamespace(on_error=noted, bad=[], check=lambda: None)
    source = Damaged(image.read_bytes(), BAD, settings)
    start, length = 4 * SECTOR, 197 * SECTOR
    found = source.rescued(start, length, errno.EIO)
    assert noted.calls == settings.bad == BAD
    assert bytes(found) == with_zeroes(image, BAD)[start : start + length]
    assert isinstance(noted.errors[0], OSError)
    settings.on_error = None
    with pytest.raises(nbd.DiskError, match=f"at offset {BAD[0][0]}: .*{SECTOR} bytes of a file"):
        source.rescued(start, length, errno.EIO)


def test_the_result_is_still_a_tuple_of_two(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    good = nbd.copy(image, tmp_path / "copied")
    assert good.bad == ()
    copied, zeroed = good
    assert good == (copied, zeroed) == (256 * SECTOR, 0)
    assert repr(good) == "Copied(copied=1048576, zeroed=0)"
    result = nbd.copy(damaged(nbdkit, image, BAD[:1]), tmp_path / "target", on_error=Noted())
    assert list(result) == [255 * SECTOR, SECTOR]
    assert repr(result) == "Copied(copied=1044480, zeroed=4096, bad=((20480, 4096),))"
    again: Any = copy.copy(result)
    assert pickle.loads(pickle.dumps(result)).bad == again.bad == result.bad


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_is_found_exactly(
    nbdkit: StartServer, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbd._disks import copy as copying

    chosen = random.Random(seed)
    monkeypatch.setattr(copying, "_MIN_RANGE", 256 * KIB)
    image, target = tmp_path / "image", tmp_path / "target"
    image.write_bytes(chosen.randbytes(chosen.choice([3 * MIB, 2 * MIB + 5120, MIB + 17])))
    size = image.stat().st_size
    places = sorted(chosen.sample(range(0, size - 512, 512), 2 * chosen.randrange(1, 20)))
    bad = [(a, min(b - a, 40 * KIB)) for a, b in zip(places[::2], places[1::2])]
    old = chosen.choice([0, 5000, -size % 4096])
    target.write_bytes(b"\xff" * (size + old))
    minimum = chosen.choice([1, 512, 4096])
    if (size + old) % minimum:
        uri = nbdkit("file", str(target)).uri
    else:
        uri = nbdkit(
            "--filter=blocksize-policy", "file", str(target), f"blocksize-minimum={minimum}",
            "blocksize-error-policy=error",
        ).uri  # fmt: skip
    source = damaged(nbdkit, image, bad)
    connections, depth = chosen.choice([1, 3]), chosen.choice([1, 16])
    result = nbd.copy(source, uri, connections=connections, depth=depth, on_error=Noted())
    assert result.bad == tuple(bad)
    assert sum(result) == size
    assert target.read_bytes() == with_zeroes(image, bad) + b"\xff" * old
