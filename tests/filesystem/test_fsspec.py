# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec.NBDFileSystem: what fsspec expects of a file system."""

from __future__ import annotations

import asyncio
import errno
import io
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import fsspec
import pytest
from support.servers import TIMEOUT, Server, StartServer
from support.sizes import MIB

MakeUrl = Callable[[str], str]


def test_an_export_is_a_file(fs: Any, url: MakeUrl, folder: Path) -> None:
    size = (folder / "one").stat().st_size
    info = fs.info(url("one"))
    assert (info["name"], info["size"], info["type"]) == (url("one"), size, "file")
    assert info["read_only"] is False
    assert fs.size(url("one")) == size
    assert fs.isfile(url("one"))
    assert fs.exists(url("one"))
    assert not fs.isdir(url("one"))


def test_block_sizes_are_reported(fs: Any, qemu_nbd: StartServer, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    server = qemu_nbd(tmp_path / "image", "--format=raw", "--read-only")
    info = fs.info(server.uri)
    assert info["read_only"] is True
    assert info["block_size_maximum"] == 32 * MIB


def test_a_server_without_a_default_export_is_a_directory(fs: Any, url: MakeUrl) -> None:
    assert fs.isdir(url(""))
    assert fs.info(url(""))["type"] == "directory"


def test_a_server_with_a_default_export_is_that_file(fs: Any, server: Server) -> None:
    assert fs.isfile(server.uri)
    assert fs.ls(server.uri, detail=False) == [server.uri]


def test_a_server_lists_its_exports(fs: Any, url: MakeUrl, folder: Path) -> None:
    names = [url("one"), url("two%202")]
    sizes = {url(one.name.replace(" ", "%20")): one.stat().st_size for one in folder.iterdir()}
    listed = fs.ls(url(""))
    assert {info["name"]: info["size"] for info in listed} == sizes
    assert {info["type"] for info in listed} == {"file"}
    assert fs.ls(url(""), detail=False) == names
    assert fs.find(url("")) == names
    assert [*fs.walk(url(""))] == [(url(""), [], ["one", "two%202"])]
    assert fs.du(url("")) == sum(sizes.values())
    assert fs.ls(url("one"), detail=False) == [url("one")]


def test_glob_finds_exports_by_their_names(fs: Any, url: MakeUrl) -> None:
    assert fs.glob(url("*")) == [url("one"), url("two%202")]
    assert fs.glob(url("t*")) == [url("two%202")]
    assert fs.glob(url("[n-p]ne")) == [url("one")]
    assert fs.glob(url("one")) == [url("one")]
    assert fs.glob(url("three")) == []
    assert list(fs.glob(url("o*"), detail=True)) == [url("one")]


def test_all_exports_are_opened_by_a_pattern(url: MakeUrl, folder: Path) -> None:
    with fsspec.open_files(url("*"), timeout=TIMEOUT) as files:
        read = [file.read() for file in files]
    assert read == [one.read_bytes() for one in sorted(folder.iterdir())]


def test_an_unknown_export_is_not_found(fs: Any, url: MakeUrl) -> None:
    assert not fs.exists(url("three"))
    for call in (fs.info, fs.cat_file, fs.open):
        with pytest.raises(FileNotFoundError) as caught:
            call(url("three"))
        assert caught.value.errno == errno.ENOENT
        assert url("three") in str(caught.value)


def test_a_server_that_does_not_listen_refuses(fs: Any, server: Server) -> None:
    server.kill()
    for call in (fs.info, fs.ls, fs.cat_file, fs.open, fs.exists):
        with pytest.raises(ConnectionRefusedError, match=server.socket):
            call(server.uri)


def test_bytes_are_read(fs: Any, url: MakeUrl, folder: Path) -> None:
    data = (folder / "one").read_bytes()
    assert fs.cat_file(url("one")) == data
    assert fs.cat(url("one")) == data
    assert fs.head(url("one"), 10) == data[:10]
    assert fs.tail(url("one"), 10) == data[-10:]
    assert fs.read_block(url("one"), 5, 7) == data[5:12]


def test_a_large_disk_is_read_whole(fs: Any, nbdkit: StartServer) -> None:
    server = nbdkit("pattern", "5000001")
    data = fs.cat_file(server.uri)
    assert len(data) == 5000001
    assert data[4999992:5000000] == (4999992).to_bytes(8, "big")


def test_ranges_of_several_disks_are_read(fs: Any, url: MakeUrl, folder: Path) -> None:
    one, two = ((folder / name).read_bytes() for name in ("one", "two 2"))
    urls = [url("one"), url("two%202"), url("one"), url("three")]
    *read, failed = fs.cat_ranges(urls, [5, 0, -10, 0], [9, None, None, 1])
    assert read == [one[5:9], two, one[-10:]]
    assert isinstance(failed, FileNotFoundError)
    assert fs.cat_ranges(urls[:2], 0, 4) == [one[:4], two[:4]]
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(urls, 0, 4, on_error="raise")
    with pytest.raises(ValueError, match="2 paths"):
        fs.cat_ranges(urls[:2], [0], [1])


def test_ranges_are_read_together(fs: Any, nbdkit: StartServer) -> None:
    # One after the other, they would take 40 seconds.
    server = nbdkit("--threads=64", "--filter=delay", "pattern", "1M", "rdelay=200ms")
    starts = list(range(0, 200 * 512, 512))
    got = fs.cat_ranges([server.uri] * 200, starts, [start + 8 for start in starts])
    assert got == [start.to_bytes(8, "big") for start in starts]


def test_a_disk_is_replaced(fs: Any, url: MakeUrl, folder: Path) -> None:
    data = bytes(reversed((folder / "one").read_bytes()))
    fs.pipe_file(url("one"), data)
    assert (folder / "one").read_bytes() == data
    fs.pipe({url("two%202"): b"x" * 4096})
    assert (folder / "two 2").read_bytes() == b"x" * 4096


@pytest.mark.parametrize(("count", "number"), [(4095, errno.EINVAL), (4097, errno.ENOSPC)])
def test_a_disk_is_not_replaced_by_another_size(
    fs: Any, url: MakeUrl, folder: Path, tmp_path: Path, count: int, number: int
) -> None:
    before = (folder / "two 2").read_bytes()
    (tmp_path / "image").write_bytes(bytes(count))
    for call, what in ((fs.pipe_file, None), (fs.put_file, str(tmp_path / "image"))):
        with pytest.raises(OSError, match="4096 bytes") as caught:
            call(url("two%202"), bytes(count)) if what is None else call(what, url("two%202"))
        assert caught.value.errno == number
    assert (folder / "two 2").read_bytes() == before


def test_a_part_is_written_at_an_offset(fs: Any, url: MakeUrl, folder: Path) -> None:
    data = bytearray((folder / "one").read_bytes())
    fs.pipe_file(url("one"), b"part", offset=1000)
    data[1000:1004] = b"part"
    assert (folder / "one").read_bytes() == data
    with pytest.raises(OSError, match="do not fit") as caught:
        fs.pipe_file(url("one"), b"part", offset=len(data) - 3)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="-1"):
        fs.pipe_file(url("one"), b"part", offset=-1)


def test_a_read_only_export_is_not_written(fs: Any, nbdkit: StartServer, tmp_path: Path) -> None:
    uri = nbdkit("--readonly", "memory", "512").uri
    (tmp_path / "image").write_bytes(bytes(512))
    calls: list[Callable[[], object]] = [
        lambda: fs.pipe_file(uri, bytes(512)),
        lambda: fs.put_file(tmp_path / "image", uri),
        lambda: fs.open(uri, "r+b"),
    ]
    for call in calls:
        with pytest.raises(PermissionError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
        assert caught.value.filename == uri


def test_disks_are_copied_to_files_and_back(
    fs: Any, url: MakeUrl, folder: Path, tmp_path: Path
) -> None:
    data = (folder / "one").read_bytes()
    local = tmp_path / "one.img"
    local.write_bytes(bytes(2 * len(data)))
    fs.get(url("one"), str(local))
    assert local.read_bytes() == data
    local.write_bytes(bytes(reversed(data)))
    fs.put(str(local), url("one"))
    assert (folder / "one").read_bytes() == bytes(reversed(data))


def test_disks_are_copied_into_a_folder_by_their_names(
    fs: Any, url: MakeUrl, folder: Path, tmp_path: Path
) -> None:
    for number, source in enumerate((url("*"), [url("one"), url("two%202")])):
        target = tmp_path / str(number)
        fs.get(source, str(target))
        read = {one.name: one.read_bytes() for one in target.iterdir()}
        assert read == {one.name: one.read_bytes() for one in folder.iterdir()}


def test_a_disk_is_copied_to_another(fs: Any, url: MakeUrl, server: Server, folder: Path) -> None:
    (folder / "big").write_bytes(b"b" * MIB)
    fs.cp_file(url("big"), server.uri)
    assert fs.cat_file(server.uri) == b"b" * MIB


@pytest.mark.parametrize("call", ["rm", "rm_file", "mkdir", "makedirs", "rmdir", "touch"])
def test_a_disk_is_not_made_or_removed(fs: Any, url: MakeUrl, call: str) -> None:
    with pytest.raises(PermissionError) as caught:
        getattr(fs, call)(url("one"))
    assert caught.value.errno == errno.EPERM
    assert caught.value.filename == url("one")


def test_what_exists_already_is_not_refused(fs: Any, url: MakeUrl) -> None:
    fs.makedirs(url(""), exist_ok=True)
    fs.touch(url("one"), truncate=False)


@pytest.mark.parametrize("mode", ["wb", "ab", "w+b"])
def test_a_mode_that_replaces_the_disk_is_refused(fs: Any, url: MakeUrl, mode: str) -> None:
    with pytest.raises(io.UnsupportedOperation, match=r"use 'r\+b'"):
        fs.open(url("one"), mode)


def test_nothing_is_created_exclusively(fs: Any, url: MakeUrl) -> None:
    with pytest.raises(FileExistsError):
        fs.open(url("one"), "xb")
    with pytest.raises(FileExistsError):
        fs.pipe_file(url("one"), b"", mode="create")


@pytest.mark.parametrize("mode", ["r+b", "rb+"])
def test_an_open_disk_is_read_and_written(url: MakeUrl, folder: Path, mode: str) -> None:
    with fsspec.open(url("one"), mode, timeout=TIMEOUT) as file:
        file.seek(10)
        file.write(b"written")
        file.seek(8)
        data = file.read(11)
    assert data == (folder / "one").read_bytes()[8:19]
    assert data[2:9] == b"written"


def test_text_and_compression_are_fsspec_s(fs: Any, url: MakeUrl, folder: Path) -> None:
    with fsspec.open(str(folder / "text.gz"), "wt", compression="gzip") as file:
        file.write("line\n" * 1000)
    with fsspec.open(url("text.gz"), "rt", compression="gzip", timeout=TIMEOUT) as file:
        assert file.read() == "line\n" * 1000


def test_no_two_reads_of_a_disk_may_be_taken_for_the_same(fs: Any, url: MakeUrl) -> None:
    assert fs.ukey(url("one")) != fs.ukey(url("one"))
    assert fs.checksum(url("one")) != fs.checksum(url("one"))


def test_methods_can_be_awaited(url: MakeUrl, folder: Path) -> None:
    async def main() -> Any:
        fs = fsspec.filesystem("nbd", asynchronous=True, timeout=TIMEOUT)
        sizes = await asyncio.gather(*(fs._size(one) for one in await fs._glob(url("*"))))
        with pytest.raises(RuntimeError, match="await"):
            fs.size(url("one"))
        return sizes

    assert asyncio.run(main()) == [one.stat().st_size for one in sorted(folder.iterdir())]


def test_tls_settings_are_options(nbdkit: StartServer, psk: Path) -> None:
    uri = nbdkit("memory", "1M", tls="require", psk=psk).uri
    options = {"tls_psk_file": str(psk), "tls_username": "alice", "timeout": TIMEOUT}
    fs = fsspec.filesystem("nbds+unix", **options)
    assert fs.size(uri) == MIB
    assert fs.ls(uri, detail=False) == [uri]
    with fs.open(uri) as file:
        assert file.read(4) == bytes(4)
    fs._clients.close(wait=True)


def test_a_url_with_local_files_says_which_option_to_pass(fs: Any, server: Server) -> None:
    uri = f"{server.uri}&tls-psk-file=/keys.psk"
    for call in (fs.info, fs.open):
        with pytest.raises(PermissionError, match="pass uri_allow_local_file=True"):
            call(uri)


def test_without_fsspec_the_import_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['fsspec'] = None; import nbd.fsspec"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "ImportError: nbd.fsspec needs the package fsspec: pip install" in done.stderr
