"""qemu-nbd: dirty bitmaps, allocation depth, and holes in structured reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.handles import extents, finish
from support.servers import StartServer, run
from support.sizes import KIB, MIB

import nbd

BITMAP = "qemu:dirty-bitmap:bitmap0"
DEPTH = "qemu:allocation-depth"
DIRTY = 1


@pytest.fixture
def bitmap(qemu_nbd: StartServer, dirty_qcow2: Path, h: nbd.NBD) -> nbd.NBD:
    """Return a handle with base:allocation and the dirty bitmap of an image."""
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.add_meta_context(BITMAP)
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0").socket)
    return h


def by_context(found: list[Any]) -> dict[str, list[int]]:
    """Return the entries of each context."""
    return {context: entries for context, _, entries, _ in found}


def test_the_dirty_bitmap_is_offered(bitmap: nbd.NBD) -> None:
    assert bitmap.can_meta_context(BITMAP)


def test_the_dirty_bitmap_reports_what_was_written(bitmap: nbd.NBD) -> None:
    assert by_context(extents(bitmap, MIB))[BITMAP] == [
        128 * KIB, 0, 64 * KIB, DIRTY, 832 * KIB, 0,
    ]  # fmt: skip


def test_base_allocation_comes_in_the_same_command(bitmap: nbd.NBD) -> None:
    found = by_context(extents(bitmap, MIB))
    assert set(found) == {nbd.CONTEXT_BASE_ALLOCATION, BITMAP}
    assert found[nbd.CONTEXT_BASE_ALLOCATION][2:4] == [64 * KIB, 0]


def test_the_dirty_data_can_be_read(bitmap: nbd.NBD) -> None:
    assert bitmap.pread(64 * KIB, 128 * KIB) == b"\x5a" * 64 * KIB


def test_the_dirty_bitmap_by_aio(bitmap: nbd.NBD) -> None:
    found: list[Any] = []

    def extent(context: str, offset: int, entries: list[int], error: Any) -> int:
        found.append((context, offset, list(entries), error.value))
        return 0

    finish(bitmap, bitmap.aio_block_status(MIB, 0, extent))
    assert by_context(found)[BITMAP][2:4] == [64 * KIB, DIRTY]


def test_the_dirty_bitmap_is_listed_while_negotiating(
    qemu_nbd: StartServer, dirty_qcow2: Path, h: nbd.NBD
) -> None:
    h.set_opt_mode(True)
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0").socket)
    names: list[str] = []
    h.add_meta_context("qemu:")
    h.opt_list_meta_context(names.append)
    assert BITMAP in names


def test_allocation_depth_reports_the_layer(
    qemu_nbd: StartServer, dirty_qcow2: Path, tmp_path: Path, h: nbd.NBD
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    backing = ["-b", str(dirty_qcow2), "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay))
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(overlay))
    h.add_meta_context(DEPTH)
    h.connect_unix(qemu_nbd(overlay, "--format=qcow2", "--allocation-depth").socket)
    assert by_context(extents(h, MIB))[DEPTH] == [
        64 * KIB, 1, 64 * KIB, 0, 64 * KIB, 2, 832 * KIB, 0,
    ]  # fmt: skip


def test_a_structured_read_reports_holes(bitmap: nbd.NBD) -> None:
    chunks: list[tuple[int, int, int]] = []

    def chunk(view: memoryview, offset: int, status: int, error: Any) -> int:
        chunks.append((offset, len(view), status))
        return 0

    data = bitmap.pread_structured(256 * KIB, 0, chunk)
    assert sorted(chunks) == [
        (0, 128 * KIB, nbd.READ_HOLE),
        (128 * KIB, 64 * KIB, nbd.READ_DATA),
        (192 * KIB, 64 * KIB, nbd.READ_HOLE),
    ]
    assert data.count(0x5A) == 64 * KIB


def test_a_hole_reads_as_zeroes_into_a_used_buffer(bitmap: nbd.NBD) -> None:
    buf = nbd.Buffer.from_bytearray(b"x" * 64 * KIB)
    finish(bitmap, bitmap.aio_pread(buf, 0))
    assert buf.is_zero()


def test_a_chunk_of_a_hole_is_a_view_of_zeroes(bitmap: nbd.NBD) -> None:
    seen: list[bytes] = []
    bitmap.pread_structured(4096, 0, lambda view, *rest: seen.append(bytes(view)))
    assert seen == [bytes(4096)]


def test_the_export_has_a_name_and_a_description(
    qemu_nbd: StartServer, dirty_qcow2: Path, h: nbd.NBD
) -> None:
    options = ["--format=qcow2", "--export-name=disk", "--description=a disk"]
    h.set_opt_mode(True)
    h.connect_unix(qemu_nbd(dirty_qcow2, *options).socket)
    found: list[tuple[str, str]] = []
    h.opt_list(lambda *export: found.append(export))
    assert found == [("disk", "a disk")]


def test_a_read_only_server(qemu_nbd: StartServer, dirty_qcow2: Path, h: nbd.NBD) -> None:
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--read-only").socket)
    assert h.is_read_only()


def test_what_is_written_is_in_the_image(
    qemu_nbd: StartServer, dirty_qcow2: Path, h: nbd.NBD
) -> None:
    server = qemu_nbd(dirty_qcow2, "--format=qcow2", tcp=True)
    h.connect_uri(server.uri)
    h.pwrite(b"w" * 4096, 512 * KIB)
    h.flush()
    h.shutdown()
    server.stop()
    run("qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x77 512k 4k", str(dirty_qcow2))


def test_a_missing_export_is_reported_while_negotiating(
    qemu_nbd: StartServer, dirty_qcow2: Path, h: nbd.NBD
) -> None:
    h.set_opt_mode(True)
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--export-name=disk").socket)
    h.set_export_name("another")
    with pytest.raises(nbd.Error) as caught:
        h.opt_info()
    assert caught.value.errno == "ENOENT"
