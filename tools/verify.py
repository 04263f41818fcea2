# SPDX-License-Identifier: LGPL-2.0-or-later
"""Does a distribution work?  It is installed into a fresh environment, here or in a bare root."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from console import ROOT, Failure, clean_environment, log_path, logged, show_end, shown
from roots import AS_ROOT, derived, entering, locked

PROBE = ROOT / "tools" / "probe.py"
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
# nbdkit takes a listening socket as descriptor 3 if LISTEN_PID is its own number: exec keeps it.
ACTIVATE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


class Found(NamedTuple):
    """What an installed distribution said."""

    where: str
    mode: str
    libnbd: str
    note: str = ""


def pythons() -> list[str]:
    """A CPython of every version that this machine has, Debian's and pyenv's."""
    found: dict[str, str] = {}
    for version in PYTHONS:
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        for candidate in (f"/usr/bin/python{version}", *map(str, kept)):
            if os.access(candidate, os.X_OK):
                found.setdefault(version, candidate)
    return list(found.values())


def verify_here(distribution: Path, python: str, mode: str) -> Found:
    """Install into a fresh environment and run from another folder."""
    log = log_path(f"verify-{distribution.name}-{python.strip('/').replace('/', '-')}")
    log.unlink(missing_ok=True)
    environ = clean_environment(NBD_CFFI_MODE=mode.lower())
    with tempfile.TemporaryDirectory(prefix="nbd-verify-") as name:
        folder = Path(name)
        fresh = folder / "environment" / "bin" / "python"
        steps: list[list[object]] = [
            [python, "-m", "venv", folder / "environment"],
            [fresh, "-m", "pip", "install", "--no-input", distribution],
        ]
        for step in steps:
            if logged(log, step, environ=environ, cwd=folder) != 0:
                failed(distribution, python, log)
        text = probed([str(fresh), str(PROBE)], folder, log)
    return judged(json.loads(text), mode)


def failed(distribution: Path, where: str, log: Path) -> NoReturn:
    """Show why it failed, and raise."""
    show_end(log)
    raise Failure(f"{distribution.name} does not work with {where} (log: {shown(log)})")


def probed(command: Sequence[str], cwd: Path, log: Path) -> str:
    """What the probe prints; Failure if it does not get that far."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    if done.returncode != 0:
        show_end(log)
        raise Failure(f"the probe failed (log: {shown(log)})")
    return done.stdout


def judged(findings: dict[str, Any], mode: str) -> Found:
    """What the probe found, if it is what was wanted."""
    match = re.search(r"\((\w+) (\d+\.\d+)\S*, cffi (\w+) mode\)", findings["version"])
    if match is None:
        raise Failure(f"python -m nbd --version is not understood: {findings['version']}")
    interpreter, version, found = match.groups()
    if found != mode:
        raise Failure(f"{findings['module']} is in {found} mode, not in {mode} mode")
    path = findings["libnbd_file"]
    origin = "its own" if "libnbd_cffi.libs" in path else "the system's"
    return Found(f"{interpreter} {version}", found, f"{findings['libnbd']}, {origin}")


@contextmanager
def serving(sock: socket.socket, *options: str) -> Iterator[None]:
    """Run nbdkit's pattern plugin on a socket that listens already."""
    command = ["nbdkit", "--foreground", "--exit-with-parent", *options, "pattern", "1M"]
    with sock:
        sock.listen()
        shell = ["/bin/sh", "-c", ACTIVATE, "sh", *command]
        process = subprocess.Popen(shell, stdin=sock.fileno(), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def servers(root: Path) -> Iterator[list[str]]:
    """Servers outside a root, and the URIs by which they are reached from inside."""
    with ExitStack() as stack:
        inside = Path(tempfile.mkdtemp(prefix="nbd-", dir=root / "tmp"))
        stack.callback(shutil.rmtree, inside)
        visible = "/" / inside.relative_to(root)
        keys = inside / "keys.psk"
        keys.write_text(f"alice:{os.urandom(32).hex()}\n")

        local = socket.socket(socket.AF_UNIX)
        # A path inside a root can be too long for a socket's address.  One by a descriptor is not.
        folder = os.open(inside, os.O_PATH)
        local.bind(f"/proc/self/fd/{folder}/sock")
        os.close(folder)
        plain, secure = socket.socket(), socket.socket()
        plain.bind(("127.0.0.1", 0))
        secure.bind(("127.0.0.1", 0))
        uris = [
            f"nbd://127.0.0.1:{plain.getsockname()[1]}",
            f"nbd+unix:///?socket={visible}/sock",
            f"nbds://alice@127.0.0.1:{secure.getsockname()[1]}/?tls-psk-file={visible}/keys.psk",
        ]
        stack.enter_context(serving(local))
        stack.enter_context(serving(plain))
        stack.enter_context(serving(secure, "--tls=require", f"--tls-psk={keys}"))
        yield uris


_INSIDE = """
set -e
"$1" -m venv /tmp/fresh
date +%s.%N
/tmp/fresh/bin/python -m pip install --no-input --no-cache-dir "$2"
cd /
shift 2
/tmp/fresh/bin/python /tmp/probe.py "$@"
"""


def verify_in_root(suite: str, wheel: Path, python: str, mode: str) -> Found:
    """Install into a bare root with python3 and pip; read from servers outside it."""
    packages = ("python3", "python3-venv", "pypy3", "pypy3-venv")
    root = derived(suite, "python", packages)
    log = log_path(f"verify-{suite}-{Path(python).name}")
    log.unlink(missing_ok=True)
    with locked(root.name), servers(root) as uris:
        for stale in ("fresh", "probe.py"):
            subprocess.run([*AS_ROOT, "rm", "-rf", str(root / "tmp" / stale)], check=True)
        for file in (wheel, PROBE):
            subprocess.run([*AS_ROOT, "cp", str(file), str(root / "tmp")], check=True)
        inside = ["sh", "-c", _INSIDE, "sh", python, f"/tmp/{wheel.name}", *uris]
        text = probed(entering(root, inside), Path("/"), log)
        subprocess.run([*AS_ROOT, "rm", str(root / "tmp" / wheel.name)], check=True)
    lines = text.splitlines()
    findings = json.loads(lines[-1])
    downloads = [line.split()[1].rpartition("/")[2] for line in lines if "Downloading" in line]
    seconds = findings["read_at"] - float(lines[0])
    found = judged(findings, mode)
    if not found.libnbd.endswith("its own"):
        raise Failure(f"{suite}: libnbd came from {findings['libnbd_file']}")
    what = ", ".join(downloads) or "nothing"
    note = f"pip install to first byte read {seconds:.1f} s, downloaded {what}"
    return found._replace(where=f"{suite} {found.where}", note=note)
