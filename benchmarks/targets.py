# SPDX-License-Identifier: LGPL-2.0-or-later
"""The ratios that each workload is held to, beside which the report puts what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """The largest ratios allowed; None where there is no target.

    ``api`` is this package in API mode to libnbd's own module, on the same CPython; ``limit`` the
    same to C; ``abi`` is ABI mode to API mode; ``pypy`` is this package on PyPy to libnbd's own
    module on CPython.
    """

    api: float | None = 1.03
    limit: float | None = None
    abi: float | None = 1.1
    pypy: float | None = None

    def at_most(self, subject: str, other: str) -> float | None:
        """The target for the ratio of ``subject`` to ``other``."""
        return {
            ("api", "libnbd"): self.api,
            ("api", "C"): self.limit,
            ("abi", "api"): self.abi,
            ("pypy", "libnbd"): self.pypy,
            ("pypy-abi", "pypy"): self.abi,
        }.get((subject, other))


TARGETS = {
    "import": Row(api=1.35),
    "getter": Row(api=1.1, abi=None, pypy=1.1),
    "debug-callback": Row(api=1.5, pypy=1.1),
    "pread-512": Row(pypy=1.1),
    "pread-64k": Row(pypy=1.1),
    "pread-1m": Row(pypy=1.1),
    "pread-32m": Row(api=0.55, limit=1.4, pypy=1.1),
    "pread-into-64k": Row(api=1.0, pypy=1.1),
    "pread-into-1m": Row(api=1.0, pypy=1.1),
    "pwrite-64k": Row(pypy=1.1),
    "pwrite-1m": Row(pypy=1.1),
    "aio-pread-4k": Row(api=0.75, limit=1.35, pypy=0.7),
    "aio-pread-64k": Row(api=0.4, limit=1.3, pypy=0.35),
    "aio-pread-1m": Row(api=0.45, limit=1.2),
    "aio-pread-4k-bytearray": Row(),
    "aio-pread-64k-bytearray": Row(),
    "aio-pread-1m-bytearray": Row(),
    "aio-pwrite-64k": Row(),
    "pread-structured-1m": Row(pypy=1.1),
    "block-status-100k": Row(api=1.0, pypy=1.1),
    "threads-8": Row(pypy=1.1),
    "handles": Row(pypy=1.1),
    "copy": Row(),
    "queue-4k": Row(api=0.75),
    "queue-64k": Row(),
    "random-4k-1ms": Row(api=0.6),
    "file-64k-1ms": Row(api=0.25),
    "file-sha256": Row(api=0.95),
    "await-4k": Row(api=0.7),
    "await-64k": Row(api=0.85),
    "await-4k-uvloop": Row(api=0.7),
    "await-64k-uvloop": Row(api=0.85),
}


@dataclass(frozen=True)
class CopyRow:
    """The largest ratios allowed of this package in API mode to nbdcopy, for a whole copy."""

    wall: float
    cpu: float | None = None


COPY_TARGETS = {
    "copy-memory-null": CopyRow(wall=0.9, cpu=0.7),
    "copy-memory-memory": CopyRow(wall=0.9, cpu=0.7),
    "copy-sparse-memory": CopyRow(wall=0.9, cpu=0.7),
    "copy-memory-file": CopyRow(wall=1.0),
}
