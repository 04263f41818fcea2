"""pandas and pyarrow read tables from disks by their URLs."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas
import pyarrow.dataset
import pyarrow.fs
import pytest
from support.servers import StartServer

from nbd.fsspec import NBDFileSystem

ROWS = 100_000

# pyarrow closes no file that it opens by a file system of fsspec.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed disk:ResourceWarning")


@pytest.fixture
def table() -> pandas.DataFrame:
    return pandas.DataFrame({"number": range(ROWS), "text": [f"row {i}" for i in range(ROWS)]})


def test_pandas_reads_columns_of_parquet(
    nbdkit: StartServer, tmp_path: Path, table: pandas.DataFrame
) -> None:
    table.to_parquet(tmp_path / "table")
    url = nbdkit("file", str(tmp_path / "table")).uri
    found = pandas.read_parquet(url, columns=["text"])
    pandas.testing.assert_frame_equal(found, table[["text"]])


def test_pandas_reads_csv_with_options_of_the_file_system(
    nbdkit: StartServer, tmp_path: Path, table: pandas.DataFrame
) -> None:
    table.to_csv(tmp_path / "table", index=False)
    url = nbdkit("file", str(tmp_path / "table")).uri
    found = pandas.read_csv(url, storage_options={"timeout": 20, "connections": 2})
    pandas.testing.assert_frame_equal(found, table)


def test_pandas_reads_compressed_csv(
    nbdkit: StartServer, tmp_path: Path, table: pandas.DataFrame
) -> None:
    (tmp_path / "table").write_bytes(gzip.compress(table.to_csv(index=False).encode()))
    url = nbdkit("file", str(tmp_path / "table")).uri
    found = pandas.read_csv(url, compression="gzip")
    pandas.testing.assert_frame_equal(found, table)


def test_a_dataset_of_pyarrow_filters_several_exports(
    nbdkit: StartServer, tmp_path: Path, table: pandas.DataFrame
) -> None:
    folder = tmp_path / "exports"
    folder.mkdir()
    half = ROWS // 2
    table[:half].to_parquet(folder / "first")
    table[half:].to_parquet(folder / "second")
    uri = nbdkit("file", f"dir={folder}").uri
    fs = NBDFileSystem(skip_instance_cache=True)
    dataset = pyarrow.dataset.dataset(
        [uri.replace("/?", f"/{name}?") for name in ("first", "second")],
        filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
        format="parquet",
    )
    assert dataset.to_table(columns=["number"])["number"].to_pylist() == list(range(ROWS))
    few = dataset.to_table(filter=pyarrow.dataset.field("number") >= ROWS - 5)
    assert few["number"].to_pylist() == list(range(ROWS - 5, ROWS))
