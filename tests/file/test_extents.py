"""nbd.extents: it covers the whole range in order, however the server splits its replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.hostile import CHUNK_BLOCK_STATUS, Connection, Wire, extents
from support.servers import StartServer

import nbd

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
DATA, HOLE = 0, nbd.STATE_HOLE | nbd.STATE_ZERO
ONE_AT_A_TIME = "extents=echo $4 32768 $(( ($4 / 131072 % 2) * 3 ))"


@pytest.fixture
def sparse(disk: nbd.NBD) -> nbd.NBD:
    """Return a disk of 1 MiB with data in its first and fifth 32 KiB."""
    disk.pwrite(b"data", 0)
    disk.pwrite(b"data", 128 * KIB)
    return disk


def test_the_whole_disk_is_covered(sparse: nbd.NBD) -> None:
    assert list(nbd.extents(sparse)) == [
        (0, 32 * KIB, DATA),
        (32 * KIB, 96 * KIB, HOLE),
        (128 * KIB, 32 * KIB, DATA),
        (160 * KIB, 864 * KIB, HOLE),
    ]


def test_an_extent_has_names(sparse: nbd.NBD) -> None:
    first = next(nbd.extents(sparse))
    assert (first.offset, first.length, first.flags) == (0, 32 * KIB, DATA)


def test_a_part_is_clipped_at_both_ends(sparse: nbd.NBD) -> None:
    assert list(nbd.extents(sparse, start=1, end=32 * KIB + 5)) == [
        (1, 32 * KIB - 1, DATA),
        (32 * KIB, 5, HOLE),
    ]


def test_an_empty_part_has_no_extents(sparse: nbd.NBD) -> None:
    assert list(nbd.extents(sparse, start=5, end=5)) == []


def test_neighbours_of_several_answers_are_merged(nbdkit: StartServer) -> None:
    server = nbdkit("eval", "get_size=echo 1M", "pread=exit 1", ONE_AT_A_TIME)
    with nbd.connect(server.uri) as h:
        found = list(nbd.extents(h))
    assert [one.offset for one in found] == list(range(0, MIB, 128 * KIB))
    assert {one.length for one in found} == {128 * KIB}
    assert {one.flags for one in found[::2]} == {DATA}
    assert {one.flags for one in found[1::2]} == {HOLE}


def test_the_server_is_asked_again_from_where_it_stopped(
    nbdkit: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = nbdkit("eval", "get_size=echo 256K", "pread=exit 1", ONE_AT_A_TIME)
    asked: list[int] = []
    name = "block_status_64" if hasattr(nbd.NBD, "block_status_64") else "block_status"
    ask: Any = getattr(nbd.NBD, name)

    def count(self: nbd.NBD, count: int, offset: int, *rest: Any) -> None:
        asked.append(offset)
        ask(self, count, offset, *rest)

    monkeypatch.setattr(nbd.NBD, name, count)
    with nbd.connect(server.uri) as h:
        list(nbd.extents(h))
    assert asked == sorted(set(asked))
    assert len(asked) <= 256 // 32


def test_a_disk_may_be_larger_than_32_bits_count(nbdkit: StartServer) -> None:
    with nbd.connect(nbdkit("memory", str(20 * TIB)).uri) as h:
        h.pwrite(b"end", 17 * TIB)
        found = list(nbd.extents(h))
    assert found == [
        (0, 17 * TIB, HOLE),
        (17 * TIB, 32 * KIB, DATA),
        (17 * TIB + 32 * KIB, 3 * TIB - 32 * KIB, HOLE),
    ]


def test_what_is_asked_for_has_the_size_of_blocks(nbdkit: StartServer) -> None:
    policy = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    server = nbdkit("--filter=blocksize-policy", "memory", "1M", *policy)
    with nbd.connect(server.uri) as h:
        h.pwrite(b"x" * 4096, 0)
        assert list(nbd.extents(h, start=100, end=200)) == [(100, 100, DATA)]


def test_several_contexts_are_cut_where_one_of_them_changes(
    qemu_nbd: StartServer, dirty_qcow2: Path
) -> None:
    contexts = (nbd.CONTEXT_BASE_ALLOCATION, "qemu:dirty-bitmap:bitmap0")
    server = qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0")
    with nbd.connect(server.uri, contexts=contexts) as h:
        both = list(nbd.extents(h, contexts))
        dirty = [(one.offset, one.length) for one in nbd.extents(h, contexts[1]) if one.flags]
    assert dirty == [(128 * KIB, 64 * KIB)]
    assert sum(one.length for one in both) == MIB
    assert [one.flags[1] for one in both if one.offset == 128 * KIB] == [1]
    assert sum(one.length for one in both if one.flags[1]) == 64 * KIB


def test_a_context_that_was_not_negotiated_is_reported(h: nbd.NBD, nbdkit: StartServer) -> None:
    h.connect_uri(nbdkit("memory", "1M").uri)
    with pytest.raises(nbd.Error, match=r"call h\.add_meta_context") as refused:
        nbd.extents(h)
    assert refused.value.errno == "ENOTSUP"


def test_a_handle_that_is_not_connected_is_reported(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        nbd.extents(h)


@pytest.mark.parametrize(("start", "end"), [(-1, None), (2, 1), (0, MIB + 1)])
def test_a_range_outside_the_disk_is_refused(disk: nbd.NBD, start: int, end: int | None) -> None:
    with pytest.raises(ValueError, match="not a range of a disk of 1048576 bytes"):
        nbd.extents(disk, start=start, end=end)


def test_the_handle_can_be_used_meanwhile(sparse: nbd.NBD) -> None:
    for extent in nbd.extents(sparse):
        assert (sparse.pread(4, extent.offset) == b"data") == (extent.flags == DATA)


def test_an_answer_of_another_context_is_an_error_and_no_endless_loop(
    disk: nbd.NBD, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("block_status", "block_status_64"):
        monkeypatch.setattr(nbd.NBD, name, lambda *arguments: None, raising=False)
    with pytest.raises(nbd.Error, match="no extent of base:allocation at offset 0") as refused:
        next(nbd.extents(disk))
    assert refused.value.errno == "EPROTO"


def test_a_server_that_dies_is_an_error(nbdkit: StartServer) -> None:
    server = nbdkit("eval", "get_size=echo 1M", "pread=exit 1", ONE_AT_A_TIME)
    with nbd.connect(server.uri) as h:
        found = nbd.extents(h)
        server.kill()
        with pytest.raises(nbd.Error):
            list(found)


CONTEXT = 7


def answering(*chunks: tuple[int, ...]) -> Connection:
    """Serve each block_status with these extents, one chunk for each tuple."""

    def script(wire: Wire) -> None:
        wire.negotiate(contexts=[(CONTEXT, nbd.CONTEXT_BASE_ALLOCATION.encode())])
        while True:
            request = wire.request()
            for chunk in chunks[:-1]:
                wire.chunk(request, CHUNK_BLOCK_STATUS, extents(CONTEXT, *chunk), done=False)
            wire.chunk(request, CHUNK_BLOCK_STATUS, extents(CONTEXT, *chunks[-1]))

    return Connection(script)


@pytest.mark.parametrize(
    "chunks",
    [
        ((0, DATA),),
        ((0, DATA, 0, HOLE),),
        ((MIB, DATA), (MIB, HOLE)),
        ((512, HOLE), (512, HOLE)),
        ((MIB // 2, HOLE), (MIB // 2, HOLE)),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_an_error(
    h: nbd.NBD, chunks: tuple[tuple[int, ...], ...]
) -> None:
    with answering(*chunks) as connection:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_socket(connection.fileno())
        with pytest.raises(nbd.Error) as broken:
            list(nbd.extents(h))
        h.close()
    assert broken.value.errno == "EPROTO"


@pytest.mark.parametrize("chunk", [(512, HOLE), (MIB, HOLE), (2**32 - 1, HOLE)])
def test_short_and_long_answers_cover_the_range_and_no_more(
    h: nbd.NBD, chunk: tuple[int, ...]
) -> None:
    with answering(chunk) as connection:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_socket(connection.fileno())
        if chunk[0] > MIB // 4 and hasattr(h, "block_status_64"):
            with pytest.raises(nbd.Error) as refused:  # newer libnbd refuses so long a reply
                list(nbd.extents(h, start=1, end=MIB // 4))
            assert refused.value.errno == "EPROTO"
        else:
            assert list(nbd.extents(h, start=1, end=MIB // 4)) == [(1, MIB // 4 - 1, HOLE)]
        h.close()
