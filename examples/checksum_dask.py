# SPDX-License-Identifier: LGPL-2.0-or-later
"""Print the SHA-256 checksum of each block of a disk, hashed by the workers of a Dask cluster.

The workers get the URI and the offsets, and read by connections of their own: so with workers on
many machines, the work outgrows one.  They need this package and fsspec, too.

    python checksum_dask.py nbd://server/disk
    python checksum_dask.py nbd://server/disk --workers 8 --block 67108864
    python checksum_dask.py nbd://server/disk --scheduler tcp://scheduler:8786

It needs dask and fsspec: pip install dask[distributed] libnbd-cffi[fsspec].
"""

from __future__ import annotations

import argparse
import hashlib
import sys

import fsspec
from distributed import Client, LocalCluster

PIECE = 8 * 1024 * 1024  # bytes that a worker reads at once


def checksum(uri: str, start: int, stop: int) -> str:
    """Hash a block; this runs in a worker."""
    digest = hashlib.sha256()
    with fsspec.open(uri, "rb") as disk:
        disk.seek(start)
        while data := disk.read(min(PIECE, stop - disk.tell())):
            digest.update(data)
    return digest.hexdigest()


def main() -> None:
    """Print a line for each block: its checksum, offset and length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("--block", type=int, default=64 * 1024 * 1024, help="bytes")
    parser.add_argument("--workers", type=int, default=2, help="processes on this machine")
    parser.add_argument("--scheduler", help="the address of a cluster that is running")
    options = parser.parse_args()
    size = fsspec.url_to_fs(options.uri)[0].size(options.uri)
    starts = range(0, size, options.block)
    stops = [min(start + options.block, size) for start in starts]
    cluster = options.scheduler or LocalCluster(
        n_workers=options.workers,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # a port that is free
    )
    with Client(cluster) as client:
        futures = client.map(checksum, [options.uri] * len(stops), starts, stops)
        for start, stop, future in zip(starts, stops, futures):
            print(f"{future.result()}  {start} {stop - start}")
    if not options.scheduler:
        cluster.close()


if __name__ == "__main__":
    try:
        main()
    except OSError as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
