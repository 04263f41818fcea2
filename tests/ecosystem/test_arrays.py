"""h5py, zarr and numpy use a disk as a file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import fsspec
import h5py
import numpy
import pytest
import zarr
from support.servers import StartServer
from support.sizes import MIB

import nbd

DATA = numpy.arange(200_000).reshape(200, 1000)


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    """Return an HDF5 file with one dataset."""
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("numbers", data=DATA, chunks=(20, 100))
    return path


def test_h5py_reads_a_disk(nbdkit: StartServer, hdf5: Path) -> None:
    url = nbdkit("file", str(hdf5)).uri
    with fsspec.open(url, "rb") as disk, h5py.File(disk, "r") as file:
        assert (file["numbers"][30:50, 10:400] == DATA[30:50, 10:400]).all()


def test_h5py_changes_a_disk_in_place(nbdkit: StartServer, hdf5: Path) -> None:
    with nbd.open(nbdkit("file", str(hdf5)).uri, "r+b") as disk, h5py.File(disk, "r+") as file:
        file["numbers"][7, :] = -1
    with h5py.File(hdf5, "r") as file:
        assert (file["numbers"][7] == -1).all()
        assert (file["numbers"][8:] == DATA[8:]).all()


def test_h5py_does_not_make_a_new_file_on_a_disk(nbdkit: StartServer) -> None:
    # It would have to truncate the disk to 0 bytes; it hides our exception, and has one of its own.
    with nbd.open(nbdkit("memory", "1M").uri, "w+b") as disk:
        with pytest.raises(OSError, match="file signature not found"):
            h5py.File(disk, "w")
        disk.seek(0)
        assert disk.read() == bytes(MIB)


def test_zarr_reads_a_zip_file_on_a_disk(nbdkit: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zarr.storage.ZipStore(path, mode="w") as store:
        zarr.create_array(store, data=DATA, chunks=(20, 100))
    with nbd.open(nbdkit("file", str(path)).uri) as disk:
        with zipfile.ZipFile(disk) as archive:
            assert "zarr.json" in archive.namelist()
        files = fsspec.filesystem("zip", fo=disk)
        array = zarr.open_array(zarr.storage.FsspecStore.from_mapper(files.get_mapper()))
        assert (array[30:50, 10:400] == DATA[30:50, 10:400]).all()


def test_numpy_is_told_how_to_read_a_disk(nbdkit: StartServer) -> None:
    with nbd.open(nbdkit("pattern", str(MIB)).uri) as disk:
        with pytest.raises(io.UnsupportedOperation, match=r"numpy\.frombuffer"):
            numpy.fromfile(disk)
        found = numpy.frombuffer(disk.read(4096), ">u8")
    assert (found == numpy.arange(0, 4096, 8)).all()
