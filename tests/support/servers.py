"""NBD servers for the tests; each listens before it starts, so no test has to wait or sleep.

The test process binds and listens itself, and passes the socket to the server by systemd socket
activation. A client can connect at once: the kernel queues it until the server accepts. nbd-server
does not support socket activation, so it serves a single client over its standard input.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Callable

import pytest

PACKAGES = {
    "certtool": "gnutls-bin",
    "losetup": "mount",
    "mke2fs": "e2fsprogs",
    "nbdcopy": "libnbd-bin",
    "nbd-server": "nbd-server",
    "nbdkit": "nbdkit",
    "psktool": "gnutls-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
}

# Popen passes the socket as standard input.  Socket activation expects it as descriptor 3, and the
# process ID in LISTEN_PID; exec does not change the process ID.
ACTIVATE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'

TIMEOUT = 20  # seconds until a test fails because what it waits for does not happen


def program(name: str) -> str:
    """Return the path of a program, or skip the test and name its Debian package."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package: {PACKAGES[name]})")
    return path


def short_folder() -> Path:
    """Make a folder whose path is short enough for a socket in it (108 bytes in sun_path)."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="nbd-", dir=parent if len(parent) < 60 else "/tmp"))


def listening_unix(path: Path) -> socket.socket:
    """Return a Unix socket that listens at path."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def listening_tcp(host: str) -> socket.socket:
    """Return a TCP socket that listens on host, on a port chosen by the kernel."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.bind((host, 0))
    except OSError as error:
        sock.close()
        pytest.skip(f"this machine has no address {host}: {error}")
    sock.listen()
    return sock


class Server:
    """A server process and the address on which it listens."""

    def __init__(
        self, argv: Sequence[str], folder: Path, host: str | None = None, scheme: str = "nbd"
    ) -> None:
        """Start argv on a socket of its own: TCP if host is given, else a Unix socket.

        Args:
            argv: The command line; the program must support systemd socket activation.
            folder: A folder with a short path for this server alone; it is removed with the server.
            host: The address of a TCP socket.
            scheme: The start of the URI: "nbd", or "nbds" for a server with TLS.
        """
        self.argv = list(argv)
        self.folder = folder
        self.socket = str(folder / "sock")
        self.host = host
        self.port = 0
        if host is None:
            listener = listening_unix(Path(self.socket))
            self.uri = f"{scheme}+unix:///?socket={self.socket}"
        else:
            listener = listening_tcp(host)
            self.port = listener.getsockname()[1]
            self.uri = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._errors = folder / "stderr"
        with listener, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", ACTIVATE, "sh", *argv],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    @property
    def stderr(self) -> str:
        """Everything that the server has written to its standard error so far."""
        return self._errors.read_text(errors="replace")

    def kill(self) -> None:
        """Kill the server (SIGKILL) and wait until it has ended."""
        self.process.kill()
        self.process.wait(TIMEOUT)

    def pause(self) -> None:
        """Stop all threads of the server (SIGSTOP): it answers nothing until it is resumed."""
        self.process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.pid}/task")
        while any(state(thread / "stat") not in "TX" for thread in threads.iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        """Let the server continue (SIGCONT)."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """Terminate the server (SIGTERM), wait for it, and return its exit status.

        nbdkit waits until its clients have disconnected: close the handles first.
        """
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait until the server ends by itself, and return its exit status."""
        return self.process.wait(TIMEOUT)

    def close(self) -> None:
        """Kill the server if it is running, and remove its folder."""
        # Not stop(): nbdkit would wait for its clients, and a test may have left one connected.
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        """Return the running server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the server."""
        self.close()

    def __str__(self) -> str:
        """Return the command line, for the message of a failed assertion."""
        return shlex.join(self.argv)


#: The fixtures `nbdkit` and `qemu_nbd`: functions that start a server.
StartServer = Callable[..., Server]


def state(stat: Path) -> str:
    """Return the state of a process or thread, a letter, from its stat file; X if it has ended."""
    try:
        _, _, rest = stat.read_text(errors="replace").rpartition(")")
    except (FileNotFoundError, ProcessLookupError):  # of a thread that ended meanwhile
        return "X"
    return rest.split()[0]


def nbdkit_argv(
    args: Sequence[str], tls: str | None, psk: Path | None, certificates: Path | None
) -> list[str]:
    """Return the command line of an nbdkit that serves in the foreground with these arguments.

    It has one thread unless the arguments say otherwise: with more, nbdkit 1.32 sometimes aborts
    when a client disconnects with commands in flight, and the next client finds no server.
    """
    options = ["--foreground", "--exit-with-parent", "--threads=1"]
    if tls is not None:
        options.append(f"--tls={tls}")
    if psk is not None:
        options.append(f"--tls-psk={psk}")
    if certificates is not None:
        options.append(f"--tls-certificates={certificates}")
    return [program("nbdkit"), *options, *args]


def answers_on_command(folder: Path) -> tuple[list[str], Path, Path]:
    """Return an nbdkit plugin that answers reads on command, and two named pipes in a folder.

    The server writes a line to the first pipe when it is asked for a read, and then waits for a
    line from the second.
    """
    asked, go = folder / "asked", folder / "go"
    os.mkfifo(asked)
    os.mkfifo(go)
    zeroes = "dd if=/dev/zero count=$3 iflag=count_bytes status=none"
    plugin = ["eval", "get_size=echo 1M", f"pread=echo >{asked}; read line <{go}; {zeroes}"]
    return plugin, asked, go


def qemu_nbd_argv(image: Path, options: Sequence[str]) -> list[str]:
    """Return the command line of a qemu-nbd that serves an image to any number of clients."""
    return [program("qemu-nbd"), "--persistent", "--shared=16", *options, str(image)]


@dataclass
class NbdServer:
    """nbd-server on a file, serving the one client that is connected to its standard input."""

    path: Path
    options: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """The command line, for connect_command."""
        # Port 0 tells nbd-server that its client is connected to standard input.
        configuration = ["-C", "/dev/null"]
        return [program("nbd-server"), "-d", *configuration, "0", str(self.path), *self.options]

    def start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start it on one end of a socket pair; return the process and the other end."""
        ours, its = socket.socketpair()
        with its:
            process = subprocess.Popen(
                self.argv, stdin=its.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        return process, ours


def run(*argv: str) -> str:
    """Run a program that must succeed and return what it prints."""
    command = [program(argv[0]), *argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    return done.stdout


def dirty_qcow2(path: Path, bitmap: str = "bitmap0") -> Path:
    """Make a 1 MiB qcow2 image with a persistent bitmap in which 64 KiB at 128 KiB are dirty."""
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    run("qemu-img", "bitmap", "--add", "-g", "65536", str(path), bitmap)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 90 128k 64k", str(path))
    return path


def psk_file(path: Path, username: str = "alice") -> Path:
    """Write a file of pre-shared keys for TLS with one user."""
    path.write_text(f"{username}:{os.urandom(32).hex()}\n")
    return path


def certificates(folder: Path) -> Path:
    """Make a CA and a certificate for localhost, with the file names of nbdkit and libnbd.

    Args:
        folder: An existing empty folder for the files.
    """
    template = folder / "template"

    def pem(name: str) -> str:
        return str(folder / f"{name}.pem")

    def sign(name: str, text: str, *how: str) -> None:
        run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", pem(f"{name}-key"))
        template.write_text(text)
        key = ["--load-privkey", pem(f"{name}-key"), "--template", str(template)]
        run("certtool", *how, *key, "--outfile", pem(f"{name}-cert"))

    authority = "--load-ca-certificate", pem("ca-cert"), "--load-ca-privkey", pem("ca-key")
    sign("ca", "cn=test authority\nca\ncert_signing_key\n", "--generate-self-signed")
    server = "cn=localhost\ndns_name=localhost\nip_address=127.0.0.1\ntls_www_server\nsigning_key\n"
    sign("server", server, "--generate-certificate", *authority)
    sign("client", "cn=alice\ntls_www_client\nsigning_key\n", "--generate-certificate", *authority)
    return folder


def children() -> dict[int, str]:
    """Return the running child processes of this process: {pid: name}."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            name, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found[int(entry.name)] = name.partition("(")[2]
    return found


def library_has(module: Any, names: Sequence[str]) -> str | None:
    """Return a reason to skip if the libnbd in use lacks one of these methods, else None."""
    missing = [name for name in names if not hasattr(module.NBD, name)]
    if not missing:
        return None
    return f"libnbd {module.NBD().get_version()} has no {', '.join(missing)}"
