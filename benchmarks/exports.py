# SPDX-License-Identifier: LGPL-2.0-or-later
"""The NBD servers of the workloads, on private sockets.

The servers inherit their listening sockets by socket activation.  Clients can connect as soon as
the socket is made, so nothing has to wait for a server to start.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from programs import call

# LISTEN_PID has to be the server's process id; exec keeps that of the shell.
_ACTIVATE = 'exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@" 3<&0 </dev/null'


def _server(name: str, size: int, folder: Path) -> list[str]:
    if name == "qcow2":
        image = str(folder / "qcow2")
        call(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)])
        return ["qemu-nbd", "--persistent", "--shared=16", "--format=qcow2", image]
    memory = ["memory", f"size={size}"]
    plugin = {
        "null": ["null", "size=1T"],
        "late": ["--filter=delay", "--threads=32", "null", "size=1T", "rdelay=1ms"],
        # This allocator has no holes: its zeroes are reported as data.
        "half": [*memory, "allocator=malloc"],
        # qemu-img compare would ask for the extents one by one, each time of all that remains.
        "target": ["--filter=noextents", *memory],
        # A file of this name, and a log of what is read of it.
        "disk": ["--filter=log", "file", str(folder / "disk"), f"logfile={folder}/log"],
    }.get(name, memory)
    return ["nbdkit", "--foreground", "--exit-with-parent", *plugin]


def _listen(name: str, folder: Path) -> tuple[socket.socket, str]:
    path = folder / f"{name}.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener, f"nbd+unix:///?socket={path}"


def _start(listener: socket.socket, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", _ACTIVATE, "sh", *command], stdin=listener.fileno())


@contextlib.contextmanager
def running(names: set[str], size: int, folder: Path) -> Iterator[dict[str, str]]:
    """Start the named servers, yield their URIs, and stop the servers afterwards."""
    started = []
    uris = {}
    try:
        for name in sorted(names):
            listener, uris[name] = _listen(name, folder)
            with listener:
                started.append(_start(listener, _server(name, size, folder)))
        yield uris
    finally:
        for server in started:
            server.terminate()
        for server in started:
            server.wait()
