# SPDX-License-Identifier: LGPL-2.0-or-later
"""The NBD servers of the workloads, on private sockets.

nbdkit inherits its listening socket by socket activation.  Clients can connect as soon as the
socket is made, so nothing has to wait for a server to start.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

# LISTEN_PID has to be the server's process id; exec keeps that of the shell.
_ACTIVATE = 'exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@" 3<&0 </dev/null'


def _plugin(name: str, memory_size: int) -> list[str]:
    return {
        "null": ["null", "size=1T"],
        "late": ["--filter=delay", "--threads=32", "null", "size=1T", "rdelay=1ms"],
        "memory": ["memory", f"size={memory_size}"],
        "sparse": ["memory", f"size={memory_size}"],
        "target": ["memory", f"size={memory_size}"],
        # Runs of one block each, alternately data and holes: 100,000 extents.
        "extents": ["sparse-random", "size=409600000", "percent=50", "runlength=4096", "seed=1"],
    }[name]


def _listen(name: str, folder: Path) -> tuple[socket.socket, str]:
    if name == "extents":
        # nbdkit sends each extent by a separate system call.  TCP combines them into full
        # segments; over a Unix socket, each would wake the client.
        listener = socket.create_server(("127.0.0.1", 0))
        return listener, f"nbd://127.0.0.1:{listener.getsockname()[1]}"
    path = folder / f"{name}.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener, f"nbd+unix:///?socket={path}"


def _start(listener: socket.socket, plugin: list[str]) -> subprocess.Popen[bytes]:
    nbdkit = ["nbdkit", "--foreground", "--exit-with-parent", *plugin]
    return subprocess.Popen(["sh", "-c", _ACTIVATE, "sh", *nbdkit], stdin=listener.fileno())


@contextlib.contextmanager
def running(names: set[str], memory_size: int, folder: Path) -> Iterator[dict[str, str]]:
    """Start the named servers, yield their URIs, and stop the servers afterwards."""
    started = []
    uris = {}
    try:
        for name in sorted(names):
            listener, uris[name] = _listen(name, folder)
            with listener:
                started.append(_start(listener, _plugin(name, memory_size)))
        yield uris
    finally:
        for server in started:
            server.terminate()
        for server in started:
            server.wait()
