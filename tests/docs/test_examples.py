"""The examples, run as a user runs them: each in a process, whose output is checked."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from support import servers
from support.forks import forks
from support.sizes import MIB

import nbd

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
TIMEOUT = 60  # seconds until a test fails because an example does not end
# What a program inherits: no colours or debugging, and buffered output, as users have it.
ENVIRONMENT = {
    "LIBNBD_DEBUG": "",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONUNBUFFERED": "",
    "TERM": "dumb",
}

Serve = servers.StartServer
Run = Callable[..., "subprocess.CompletedProcess[str]"]

DEFAULT_MAP = """\
             0        8388608 data
       8388608        8388608 hole,zero
      16777216        3014656 data
      19791872       22151168 hole,zero
      41943040          98304 data
      42041344       16678912 hole,zero
      58720256        7012352 data
      65732608        1376256 hole,zero
"""
COPIED = r"copied (\d+) bytes, zeroed (\d+)\n"
DEFAULT_STRIP = "████████········███·····················░···············██████▓·"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs an example in an empty folder; it must succeed."""

    def start(name: str, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *args],
            env={**os.environ, **ENVIRONMENT},
            cwd=tmp_path,
            capture_output=True,
            check=False,
            encoding="utf-8",
            timeout=TIMEOUT,
        )
        assert done.returncode == status, done.stderr
        return done

    return start


def complaint(failed: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of stderr: the interpreter may print something before it."""
    return failed.stderr.splitlines()[-1]


def on_terminal(name: str, *args: str) -> str:
    """Run an example on a terminal of 64 columns, and return its output."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect makes the pseudo-terminal")
    shown, status = pexpect.run(
        subprocess.list2cmdline([sys.executable, str(EXAMPLES / name), *args]),
        env={**os.environ, **ENVIRONMENT},
        encoding="utf-8",
        timeout=TIMEOUT,
        withexitstatus=True,
        dimensions=(25, 64),
    )
    assert status == 0, shown
    return str(shown)


def disk_image(path: Path, size: int, seed: int) -> bytes:
    """Write a sparse image with data in random places; return its content."""
    chance = random.Random(seed)
    content = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            start = chance.randrange(size)
            data = chance.getrandbits(8 * 99_999).to_bytes(99_999, "big")[: size - start]
            content[start : start + len(data)] = data
            file.seek(start)
            file.write(data)
    return bytes(content)


def pattern(size: int) -> bytes:
    """Return the data of nbdkit's pattern plugin: each 8 bytes are their own offset."""
    offsets = array("Q", range(0, size, 8))
    if sys.byteorder == "little":
        offsets.byteswap()
    return offsets.tobytes()


def needs_qemu() -> None:
    """Skip the test if one of qemu's tools is missing."""
    for tool in ("qemu-img", "qemu-nbd"):
        servers.program(tool)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert f"    python {name}" in text.split('"""')[1]


def test_hello_verifies_what_it_wrote(run: Run) -> None:
    assert run("hello.py").stdout.count("verified\n") == 2


def test_list_exports_starts_a_server_of_its_own(run: Run) -> None:
    assert run("list_exports.py").stdout.splitlines() == [
        "'boot': 1048576 bytes, writable",
        "'data': 1073741824 bytes, writable",
        "'swap': 268435456 bytes, writable",
    ]


def test_list_exports_of_a_server(run: Run, qemu_nbd: Serve, tmp_path: Path) -> None:
    disk_image(tmp_path / "disk", MIB, 1)
    name, text = "caf\u00e9", "holds data"
    server = qemu_nbd(tmp_path / "disk", "-f", "raw", "-r", "-x", name, "-D", text)
    assert run("list_exports.py", server.uri).stdout == (
        f"'{name}': {MIB} bytes, read-only: '{text}'\n"
    )


def test_map_is_text_when_piped(run: Run) -> None:
    assert run("map.py").stdout == DEFAULT_MAP


@forks
def test_map_is_a_strip_on_a_terminal() -> None:
    assert on_terminal("map.py").splitlines() == [
        DEFAULT_STRIP,
        "67108864 bytes in 8 extents, 28% of them data",
    ]


def test_map_of_a_server(run: Run, nbdkit: Serve) -> None:
    server = nbdkit("data", "data=@98304 1", "size=1M")
    assert [line.split() for line in run("map.py", server.uri).stdout.splitlines()] == [
        ["0", "98304", "hole,zero"],
        ["98304", "32768", "data"],
        ["131072", "917504", "hole,zero"],
    ]


def test_map_reports_an_error_in_one_line(run: Run, nbdkit: Serve) -> None:
    failed = run("map.py", nbdkit("memory", "1M", "--no-sr").uri, status=1)
    assert "Traceback" not in failed.stderr
    assert "map.py: nbd.extents: base:allocation was not negotiated" in complaint(failed)


def reported(copy: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """Return how many bytes the example copied and zeroed, according to its output."""
    numbers = re.fullmatch(COPIED, copy.stdout)
    assert numbers is not None, copy.stdout
    return int(numbers[1]), int(numbers[2])


def test_copy_starts_servers_of_its_own(run: Run) -> None:
    copied, zeroed = reported(run("copy_disk.py"))
    assert copied + zeroed == 256 * MIB
    assert zeroed > copied > 0


def copied_between_files(run: Run, nbdkit: Serve, folder: Path, *filters: str) -> tuple[str, str]:
    """Copy a sparse image over a file of other data; return the digests of both."""
    size = 20 * MIB + 777
    content = disk_image(folder / "source", size, 2)
    (folder / "target").write_bytes(b"old content" * (size // 11 + 1))
    source = nbdkit("file", str(folder / "source"), *filters)
    target = nbdkit("file", str(folder / "target"), *filters)
    assert sum(reported(run("copy_disk.py", source.uri, target.uri))) == size
    written = (folder / "target").read_bytes()[:size]
    return hashlib.sha256(content).hexdigest(), hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("name", ["", "nozero", "noextents", "nomulticonn"])
def test_copy_makes_every_byte_equal(run: Run, nbdkit: Serve, tmp_path: Path, name: str) -> None:
    filters = {"": [], "nomulticonn": ["--filter=multi-conn", "multi-conn-mode=disable"]}
    wanted, got = copied_between_files(
        run, nbdkit, tmp_path, *filters.get(name, [f"--filter={name}"])
    )
    assert got == wanted


def test_copy_to_and_from_qcow2(run: Run, qemu_nbd: Serve, tmp_path: Path) -> None:
    content = disk_image(tmp_path / "source.raw", 4 * MIB, 3)
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "target"), "4M")
    source = qemu_nbd(tmp_path / "source.raw", "--format=raw")
    target = qemu_nbd(tmp_path / "target", "--format=qcow2")
    run("copy_disk.py", source.uri, target.uri)
    with nbd.NBD() as h:
        h.connect_uri(target.uri)
        assert h.pread(4 * MIB, 0) == content


def test_copy_makes_a_file(run: Run, nbdkit: Serve, tmp_path: Path) -> None:
    content = disk_image(tmp_path / "source", 3 * MIB + 5, 3)
    run("copy_disk.py", nbdkit("file", str(tmp_path / "source")).uri, "target.img")
    assert (tmp_path / "target.img").read_bytes() == content


def test_copy_shows_a_bar_if_tqdm_is_there(run: Run, nbdkit: Serve) -> None:
    pytest.importorskip("tqdm", reason="tqdm draws the bar")
    shown = run("copy_disk.py", nbdkit("pattern", "8M").uri, nbdkit("memory", "8M").uri).stderr
    assert "100%" in shown
    assert "8.00M/8.00M" in shown


def test_copy_needs_no_tqdm(
    run: Run, nbdkit: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tqdm.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("copy_disk.py", nbdkit("pattern", "8M").uri, nbdkit("memory", "8M").uri)
    assert (reported(done), "%" in done.stderr) == ((8 * MIB, 0), False)


def test_copy_refuses_a_destination_that_is_too_small(run: Run, nbdkit: Serve) -> None:
    failed = run("copy_disk.py", nbdkit("memory", "2M").uri, nbdkit("memory", "1M").uri, status=1)
    assert "copy_disk.py: nbd.copy: the target has 1048576 bytes and the source 2097152" in (
        complaint(failed)
    )


@pytest.mark.parametrize("side", ["source", "destination"])
def test_copy_fails_if_a_command_fails(run: Run, nbdkit: Serve, side: str) -> None:
    broken = ["--filter=error", "error=EIO", "error-rate=50%"]
    filters = {"source": [], "destination": [], side: broken}
    failed = run(
        "copy_disk.py",
        nbdkit("pattern", "16M", *filters["source"]).uri,
        nbdkit("memory", "16M", *filters["destination"]).uri,
        status=1,
    )
    assert failed.stdout == ""
    assert "EIO" in failed.stderr


def test_checksum_of_a_disk_of_its_own(run: Run) -> None:
    wanted = hashlib.sha256(pattern(64 * MIB)).hexdigest()
    assert run("checksum.py").stdout == f"{wanted}  {64 * MIB} bytes\n"


def test_checksum_of_a_server(run: Run, nbdkit: Serve, tmp_path: Path) -> None:
    content = disk_image(tmp_path / "disk", 3 * MIB + 5, 4)
    server = nbdkit("file", str(tmp_path / "disk"))
    wanted = f"{hashlib.sha256(content).hexdigest()}  {len(content)} bytes\n"
    assert run("checksum.py", server.uri).stdout == wanted


def test_tls_psk_connects_with_the_right_key_only(run: Run) -> None:
    with_key, without = run("tls_psk.py").stdout.splitlines()
    assert with_key == "1048576 bytes, TLS: True, as alice"
    assert without.startswith("with another key: nbd_connect_command: gnutls_handshake: ")


def test_tls_psk_to_a_server(run: Run, nbdkit: Serve, psk: Path) -> None:
    server = nbdkit("memory", "64K", tls="require", psk=psk, tcp=True)
    uri = f"nbds://alice@127.0.0.1:{server.port}/?tls-psk-file={psk}"
    assert run("tls_psk.py", uri).stdout == "65536 bytes, TLS: True, as alice\n"


def test_tls_psk_does_without_no_tls(run: Run, nbdkit: Serve) -> None:
    failed = run("tls_psk.py", nbdkit("memory", "64K").uri, status=1)
    assert "TLS" in failed.stderr


def test_dirty_bitmap_makes_the_backup_equal(run: Run) -> None:
    needs_qemu()
    assert run("dirty_bitmap.py").stdout.splitlines() == [
        "dirty: 65536 bytes at 0",
        "dirty: 3080192 bytes at 49938432",
        "Images are identical.",
    ]


def test_dirty_bitmap_writes_only_what_is_dirty(
    run: Run, qemu_nbd: Serve, dirty_qcow2: Path, tmp_path: Path
) -> None:
    server = qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0")
    (tmp_path / "backup").write_bytes(b"B" * MIB)
    run("dirty_bitmap.py", server.uri, "bitmap0", "backup")
    wanted = b"B" * 131072 + b"Z" * 65536 + b"B" * (MIB - 196608)
    assert (tmp_path / "backup").read_bytes() == wanted


def test_dirty_bitmap_needs_the_bitmap(
    run: Run, qemu_nbd: Serve, dirty_qcow2: Path, tmp_path: Path
) -> None:
    server = qemu_nbd(dirty_qcow2, "--format=qcow2")
    (tmp_path / "backup").write_bytes(b"B")
    failed = run("dirty_bitmap.py", server.uri, "bitmap0", "backup", status=1)
    assert "qemu:dirty-bitmap:bitmap0 was not negotiated" in complaint(failed)


def test_dirty_bitmap_makes_a_backup_as_large_as_the_disk(
    run: Run, qemu_nbd: Serve, dirty_qcow2: Path, tmp_path: Path
) -> None:
    server = qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0")
    assert run("dirty_bitmap.py", server.uri, "bitmap0", "backup").stdout == (
        "dirty: 65536 bytes at 131072\n"
    )
    assert (tmp_path / "backup").read_bytes() == bytes(131072) + b"Z" * 65536 + bytes(MIB - 196608)


def test_backup_chain_makes_each_backup_equal(run: Run) -> None:
    needs_qemu()
    assert run("backup_chain.py").stdout.splitlines() == [
        "full: 67108864 bytes",
        "Images are identical.",
        "incremental: 1048576 bytes",
        "Images are identical.",
        "incremental: 1048576 bytes",
        "Images are identical.",
        "incremental: 1048576 bytes",
        "Images are identical.",
    ]


def write_to(disk: Path, data: str, offset: str, length: str) -> None:
    """Write a pattern to a qcow2 disk."""
    command = f"write -P {data} {offset} {length}"
    servers.run("qemu-io", "-f", "qcow2", "-c", command, str(disk))


def is_equal(disk: Path, backup: Path) -> bool:
    """Return whether a raw backup is equal to a qcow2 disk."""
    compare = ("qemu-img", "compare", "-f", "qcow2", "-F", "raw")
    return "identical" in servers.run(*compare, str(disk), str(backup))


def test_backup_chain_copies_only_what_was_written(run: Run, tmp_path: Path) -> None:
    needs_qemu()
    disk, backup = tmp_path / "disk.qcow2", tmp_path / "backup.img"
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "8M")
    write_to(disk, "1", "0", "1M")
    shown = [run("backup_chain.py", "disk.qcow2", "backup.img").stdout]
    write_to(disk, "2", "1M", "64k")
    write_to(disk, "3", "5M", "64k")
    for _ in range(2):
        shown.append(run("backup_chain.py", "disk.qcow2", "backup.img").stdout)
        assert is_equal(disk, backup)
    assert shown == [
        "full: 8388608 bytes\n",
        "incremental: 131072 bytes\n",
        "incremental: 0 bytes\n",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.img", "disk.qcow2"]


def test_backup_chain_that_failed_loses_nothing(run: Run, tmp_path: Path) -> None:
    needs_qemu()
    disk, backup = tmp_path / "disk.qcow2", tmp_path / "backup.img"
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "8M")
    run("backup_chain.py", "disk.qcow2", "backup.img")
    write_to(disk, "1", "1M", "64k")
    servers.run("qemu-img", "bitmap", "--add", str(disk), "backup-2")  # and then it failed
    write_to(disk, "2", "2M", "64k")
    shown = run("backup_chain.py", "disk.qcow2", "backup.img").stdout
    assert shown == "incremental: 131072 bytes\n"
    assert is_equal(disk, backup)
    backup.unlink()
    assert run("backup_chain.py", "disk.qcow2", "backup.img").stdout == "full: 8388608 bytes\n"
    assert is_equal(disk, backup)


def test_backup_chain_reports_a_disk_that_is_not_there(run: Run, tmp_path: Path) -> None:
    needs_qemu()
    failed = run("backup_chain.py", "missing.qcow2", "backup.img", status=1)
    assert "missing.qcow2" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "backup.img").exists()


def test_parallel_read_of_a_disk_of_its_own(run: Run) -> None:
    size = 64 * MIB
    wanted = f"{pattern(size).count(0)} of {size} bytes are zero (4 connections)\n"
    assert run("parallel_read.py").stdout == wanted


@pytest.mark.parametrize(("mode", "connections"), [("auto", 4), ("disable", 1)])
def test_parallel_read_heeds_multi_conn(
    run: Run, nbdkit: Serve, mode: str, connections: int
) -> None:
    size = MIB + 512
    filters = ["--filter=multi-conn", f"multi-conn-mode={mode}"]
    server = nbdkit("pattern", str(size), *filters)
    assert run("parallel_read.py", server.uri).stdout == (
        f"{pattern(size).count(0)} of {size} bytes are zero ({connections} connections)\n"
    )


def test_event_loop_reads_two_disks_of_its_own(run: Run) -> None:
    assert sorted(run("event_loop.py").stdout.splitlines()) == [
        "disk 1: connected, 1048576 bytes",
        "disk 1: read all of it",
        "disk 2: connected, 4194304 bytes",
        "disk 2: read all of it",
    ]


def test_event_loop_does_not_wait_for_the_slower_server(run: Run, nbdkit: Serve) -> None:
    slow = nbdkit("pattern", "128K", "--filter=delay", "rdelay=1")
    shown = run("event_loop.py", slow.uri, nbdkit("pattern", "4M").uri).stdout
    assert re.findall(r"disk (.): read all of it", shown) == ["2", "1"]


def test_event_loop_reports_a_server_that_is_not_there(run: Run, tmp_sock: str) -> None:
    failed = run("event_loop.py", f"nbd+unix:///?socket={tmp_sock}", status=1)
    assert "ENOENT" in failed.stderr


def test_asyncio_check_reads_three_disks_of_its_own(run: Run) -> None:
    assert run("asyncio_check.py").stdout.splitlines() == [
        "disk 1: 4194304 bytes, 0 bad",
        "disk 2: 8388608 bytes, 0 bad",
        "disk 3: 16777216 bytes, 0 bad",
    ]


def test_asyncio_check_reports_what_cannot_be_read(run: Run, nbdkit: Serve) -> None:
    bad = nbdkit("pattern", "1M", "--filter=error", "error-pread=EIO", "error-pread-rate=1")
    shown = run("asyncio_check.py", bad.uri, nbdkit("pattern", "1M").uri, status=1).stdout
    assert "disk 1: 1048576 bytes, 4 bad" in shown
    assert "    cannot read 262144 bytes at offset 786432" in shown
    assert "disk 2: 1048576 bytes, 0 bad" in shown


def test_asyncio_check_reports_a_server_that_is_not_there(
    run: Run, nbdkit: Serve, tmp_sock: str
) -> None:
    shown = run(
        "asyncio_check.py", f"nbd+unix:///?socket={tmp_sock}", nbdkit("null", "1M").uri, status=1
    ).stdout
    assert re.search(r"disk 1: .*\(ENOENT\)", shown)
    assert "disk 2: 1048576 bytes, 0 bad" in shown


@forks
def test_asyncio_check_shows_progress_on_a_terminal() -> None:
    assert re.search(r"\r\d+ of \d+ bytes", on_terminal("asyncio_check.py"))


def test_trio_read_of_a_disk_of_its_own(run: Run) -> None:
    pytest.importorskip("trio", reason="the example is for trio")
    assert re.fullmatch(r"\d+ of 16777216 bytes are zero\n", run("trio_read.py").stdout)


def test_trio_read_agrees_with_a_read_of_the_whole(run: Run, nbdkit: Serve) -> None:
    pytest.importorskip("trio", reason="the example is for trio")
    server = nbdkit("pattern", "8M")
    with nbd.open(server.uri) as disk:
        zeroes = disk.read().count(0)
    assert run("trio_read.py", server.uri).stdout == f"{zeroes} of {8 * MIB} bytes are zero\n"


def test_trio_read_fails_where_the_server_fails(run: Run, nbdkit: Serve) -> None:
    pytest.importorskip("trio", reason="the example is for trio")
    bad = nbdkit("pattern", "1M", "--filter=error", "error-pread=EIO", "error-pread-rate=1")
    assert "EIO" in run("trio_read.py", bad.uri, status=1).stderr
