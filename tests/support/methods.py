"""Every method of a handle, and arguments that it accepts."""

from __future__ import annotations

import inspect
from typing import Any

import nbd

# A valid value for each parameter name of the API; a name that is missing here gets 0.
ARGUMENTS: dict[str, Any] = {
    "addr": "/nowhere",
    "argv": ["/bin/false"],
    "buf": bytearray(512),
    "chunk": print,
    "completion": None,
    "context": print,
    "contexts": ["base:allocation"],
    "count": 512,
    "debug": print,
    "dir": "/nowhere",
    "extent": print,
    "extent64": print,
    "filename": "/nowhere",
    "handle_name": "x",
    "hostname": "localhost",
    "list": print,
    "metacontext": "x",
    "name": "x",
    "export_name": "x",
    "port": "0",
    "priority": "NORMAL",
    "queries": ["base:"],
    "seconds": 1,
    "socket_name": "x",
    "unixsocket": "/nowhere",
    "uri": "nbd://localhost",
    "username": "x",
}

METHODS = sorted(name for name in dir(nbd.NBD) if not name.startswith("_"))


def call_with_anything(handle: nbd.NBD, name: str) -> None:
    """Call a method with valid arguments for every parameter that has no default."""
    parameters = inspect.signature(getattr(nbd.NBD, name)).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    arguments: list[Any] = [ARGUMENTS.get(parameter, 0) for parameter in required]
    if name.endswith("connect_vsock"):
        arguments = [1, 1]
    getattr(handle, name)(*arguments)
