"""Other processes use a file system: forks, those of multiprocessing, and a Dask cluster's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import TESTS
from support.servers import StartServer
from support.sizes import MIB

EXAMPLE = TESTS.parent / "examples" / "checksum_dask.py"
SIZE = 4 * MIB


def expected(size: int, block: int) -> list[str]:
    """The checksums of the blocks of nbdkit's pattern."""
    data = b"".join(at.to_bytes(8, "big") for at in range(0, size, 8))
    return [hashlib.sha256(data[i : i + block]).hexdigest() for i in range(0, size, block)]


def run(folder: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Programs of their own: multiprocessing leaves a process behind that ends with the program.
POOL = """
import hashlib, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from nbd.fsspec import NBDFileSystem

MIB = 1 << 20

def checksum(fs, start):
    return hashlib.sha256(fs.cat_file(sys.argv[1], start, start + MIB)).hexdigest()

if __name__ == "__main__":
    fs = NBDFileSystem()
    before = checksum(fs, 0)  # the parent is connected
    context = multiprocessing.get_context(sys.argv[2])
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        print(*pool.map(checksum, [fs] * 4, range(0, 4 * MIB, MIB)), sep="\\n")
    assert checksum(fs, 0) == before
"""

READ_BYTES = """
import hashlib, sys
import dask
from dask.bytes import read_bytes
from distributed import Client, LocalCluster

if __name__ == "__main__":
    options = dict(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1")
    with LocalCluster(dashboard_address="127.0.0.1:0", **options) as cluster, Client(cluster):
        _, (blocks,) = read_bytes(sys.argv[1], blocksize=1 << 20, sample=False)
        hashes = dask.compute([dask.delayed(hashlib.sha256)(one).hexdigest() for one in blocks])
        print(*hashes[0], sep="\\n")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_by_connections_of_their_own(
    nbdkit: StartServer, tmp_path: Path, method: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(POOL)
    done = run(tmp_path, program, nbdkit("pattern", str(SIZE)).uri, method)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == expected(SIZE, MIB)


def test_workers_of_dask_read_the_blocks_of_a_disk(nbdkit: StartServer, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(READ_BYTES)
    done = run(tmp_path, program, nbdkit("pattern", str(SIZE)).uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected(SIZE, MIB)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_example_hashes_a_disk_on_workers(
    nbdkit: StartServer, tmp_path: Path, workers: str
) -> None:
    size = SIZE + 512
    url = nbdkit("pattern", str(size)).uri
    done = run(tmp_path, EXAMPLE, url, "--workers", workers, "--block", str(MIB))
    assert done.returncode == 0, done.stderr
    starts = range(0, size, MIB)
    lines = [
        f"{digest}  {start} {min(MIB, size - start)}"
        for digest, start in zip(expected(size, MIB), starts)
    ]
    assert done.stdout.splitlines() == lines


def test_the_example_says_that_a_server_is_not_there(tmp_path: Path) -> None:
    url = f"nbd+unix:///?socket={tmp_path}/nobody"
    done = run(tmp_path, EXAMPLE, url)
    assert (done.returncode, done.stdout) == (1, "")
    assert url in done.stderr.splitlines()[-1]
