# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: modules that only know files can read and write disks."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import pytest
from support.servers import StartServer, program
from support.sizes import MIB

import nbd

DATA = random.Random(1).randbytes(2 * MIB + 5)


@pytest.fixture
def uri(nbdkit: StartServer) -> str:
    """Return the URI of an empty disk of 8 MiB."""
    return nbdkit("--threads=4", "memory", "8M").uri


def test_tarfile_writes_and_reads(uri: str) -> None:
    with nbd.open(uri, "wb") as disk, tarfile.open(fileobj=disk, mode="w") as archive:
        member = tarfile.TarInfo("data")
        member.size = len(DATA)
        archive.addfile(member, io.BytesIO(DATA))
    with nbd.open(uri) as disk, tarfile.open(fileobj=disk) as archive:
        assert extracted(archive.extractfile("data")) == DATA


def extracted(file: IO[bytes] | None) -> bytes:
    """Return the bytes of a member of an archive."""
    assert file is not None
    return file.read()


def test_zipfile_reads_a_file_that_a_disk_ends_with(nbdkit: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", DATA)
    disk = nbd.open(nbdkit("file", str(path)).uri)
    with disk, zipfile.ZipFile(disk) as archive:
        assert archive.testzip() is None
        assert archive.read("data") == DATA


def test_zipfile_writes(uri: str) -> None:
    with nbd.open(uri, "w+b") as disk:
        with zipfile.ZipFile(disk, "w") as archive:
            archive.writestr("data", DATA)
        end = disk.tell()
        disk.seek(0)
        with zipfile.ZipFile(io.BytesIO(disk.read(end))) as archive:
            assert archive.read("data") == DATA


def test_gzip_writes_and_reads(uri: str) -> None:
    with nbd.open(uri, "wb") as disk, gzip.GzipFile(fileobj=disk, mode="wb") as packed:
        packed.write(DATA)
    with nbd.open(uri) as disk, gzip.GzipFile(fileobj=disk) as packed:
        assert packed.read(len(DATA)) == DATA


@pytest.mark.parametrize("length", [0, 1000, 3 * MIB])
def test_copyfileobj_copies_a_disk(uri: str, nbdkit: StartServer, length: int) -> None:
    with nbd.open(uri, "r+b") as disk:
        disk.write(DATA)
    with nbd.open(uri) as disk, nbd.open(nbdkit("memory", "8M").uri, "r+b") as other:
        shutil.copyfileobj(disk, other, length)
        other.seek(0)
        assert other.read(len(DATA)) == DATA
        assert len(other.read()) == 8 * MIB - len(DATA)


def test_file_digest_hashes_a_disk(uri: str) -> None:
    if not hasattr(hashlib, "file_digest"):
        pytest.skip("hashlib.file_digest is new in Python 3.11")
    with nbd.open(uri, "r+b") as disk:
        disk.write(DATA)
        disk.seek(0)
        digest = cast("Any", hashlib).file_digest(disk, "sha256")
    assert digest.digest() == hashlib.sha256(DATA.ljust(8 * MIB, b"\0")).digest()


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """Return an ext4 image, larger than a piece, with etc/hostname and data."""
    tree, image = tmp_path / "tree", tmp_path / "ext4"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("disk\n")
    (tree / "data").write_bytes(DATA)
    run(program("mke2fs"), "-q", "-t", "ext4", "-d", str(tree), str(image), "16M")
    return image


def run(*argv: str) -> None:
    """Run a program that must succeed."""
    import subprocess

    subprocess.run(argv, check=True, timeout=20, stdout=subprocess.DEVNULL)


def module(name: str) -> Any:
    """Import a module, or skip the test."""
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")


@pytest.mark.skipif(
    sys.version_info >= (3, 15),
    reason="dissect.cstruct 4 gives re.Scanner groups, which CPython 3.15 refuses",
)
def test_a_reader_of_ext4_finds_files(nbdkit: StartServer, ext4: Path) -> None:
    extfs = module("dissect.extfs")
    with nbd.open(nbdkit("--threads=4", "file", str(ext4)).uri) as disk:
        system = extfs.ExtFS(disk)
        assert system.get("etc/hostname").open().read() == b"disk\n"
        assert system.get("data").open().read() == DATA


def test_a_module_for_iso_images_writes_and_reads_one(uri: str) -> None:
    pycdlib = module("pycdlib")
    found = io.BytesIO()
    with nbd.open(uri, "r+b") as disk:
        image = pycdlib.PyCdlib()
        image.new(joliet=3)
        image.add_fp(io.BytesIO(DATA), len(DATA), "/DATA.;1", joliet_path="/data")
        image.write_fp(disk)
        image.close()
        disk.seek(0)
        image.open_fp(disk)
        image.get_file_from_iso_fp(found, joliet_path="/data")
        image.close()
    assert found.getvalue() == DATA
