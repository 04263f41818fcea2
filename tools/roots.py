# SPDX-License-Identifier: LGPL-2.0-or-later
"""Debian roots: made once with debootstrap, kept outside the checkout, entered with chroot.

SUITE-bare is what debootstrap makes.  Roots for a purpose start as copies of it.  Whatever is
mounted in a root, and whatever still runs there, goes with the command that was run in it.
The programs of a suite like "trixie-arm64", of another processor, are run by qemu.
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from console import ROOT, Failure, log_path, logged, must, output, say
from environments import tools
from suite import Outcome

CHECKOUT = Path("srv/libnbd-cffi")  # where a root has the copy of this checkout
NOT_COPIED = (".git", ".cache", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
SCRIPTS = Path("/usr/share/debootstrap")
FOREIGN_PROGRAMS = Path("/proc/sys/fs/binfmt_misc")
QEMU_NAMES = {"arm64": "aarch64"}

AS_ROOT: tuple[str, ...] = () if os.geteuid() == 0 else ("sudo",)

# The command runs in its own namespaces, so nobody else sees its mounts, and they end with it.
_ENTER = """
mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"
"""
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")


def cache() -> Path:
    """The folder of all roots."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "libnbd-cffi" / "roots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Lock a root, so that a command of another checkout waits for it."""
    with (cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def entering(root: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs a command in a root, with a clean environment."""
    variables = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **network_settings(root),
    }
    pairs = [f"{name}={value}" for name, value in variables.items()]
    enter = ["sh", "-c", _ENTER, str(root), "env", "-i", *pairs]
    return [*AS_ROOT, *_NAMESPACES, *enter, *command]


def network_settings(root: Path) -> dict[str, str]:
    """Let a root reach what this machine reaches, in the way this machine does.

    The name servers, the proxies, pip's settings, and the authorities that this machine was told
    to trust.  Settings of pip that name files here mean nothing there and are left out.
    """
    copy_into(root, Path("/etc/resolv.conf"), Path("etc/resolv.conf"))
    proxies = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    variables = {name: os.environ[name] for name in proxies if name in os.environ}
    settings = pip_settings()
    bundle = settings.pop("PIP_CERT", "") or os.environ.get("SSL_CERT_FILE", "")
    if Path(bundle).is_file():
        copy_into(root, Path(bundle), Path("usr/local/share/trusted.pem"))
        variables["PIP_CERT"] = variables["SSL_CERT_FILE"] = "/usr/local/share/trusted.pem"
    for name, value in settings.items():
        if not any(word.startswith(("/", "file:")) for word in value.split()):
            variables[name] = value
    return variables


def pip_settings() -> dict[str, str]:
    """What pip's configuration files and variables say here, as variables."""
    pip = tools("pip") / "pip"
    listed = output([pip, "config", "list"], "pip does not say its configuration")
    settings: dict[str, str] = {}
    # Variables come last, because they have precedence over files.
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", ":env:"):
            settings["PIP_" + key.upper().replace("-", "_")] = str(ast.literal_eval(value))
    return settings


def copy_into(root: Path, source: Path, target: Path) -> None:
    """Copy one file of this machine into a root."""
    if source.is_file():
        subprocess.run([*AS_ROOT, "cp", "--", str(source), str(root / target)], check=True)


def able_to_run(suite: str) -> None:
    """Let the kernel start qemu for the programs of another processor, until it is booted again.

    Raises:
        Failure: It cannot be had on this machine; the message says why.
    """
    _, _, architecture = suite.partition("-")
    if not architecture:
        return
    name = QEMU_NAMES[architecture]
    names = (f"qemu-{name}", f"qemu-{name}-static")
    if any((FOREIGN_PROGRAMS / one).exists() for one in names):
        return
    settings = [Path("/usr/lib/binfmt.d", f"{one}.conf") for one in names]
    settings = [one for one in settings if one.exists()]
    if not settings:
        raise Failure(f"qemu for {name} is missing (Debian, Fedora: qemu-user-static)")
    mount = f"test -e {FOREIGN_PROGRAMS}/register || mount -t binfmt_misc - {FOREIGN_PROGRAMS}"
    register = f"cat {settings[0]} >{FOREIGN_PROGRAMS}/register"
    done = subprocess.run([*AS_ROOT, "sh", "-c", f"({mount}) && {register}"], check=False)
    if done.returncode != 0:
        raise Failure(f"this machine's kernel does not let qemu run programs for {name}")


def bare(suite: str) -> Path:
    """A root as debootstrap makes it, with the certificates that HTTPS needs."""
    root = cache() / f"{suite}-bare"
    able_to_run(suite)
    with locked(root.name):
        if not root.is_dir():
            say(f"making the Debian root {root}")
            bootstrap(suite, root)
    return root


def bootstrap(suite: str, root: Path) -> None:
    """Run debootstrap; what it leaves unfinished never gets the name of the root."""
    log = log_path(f"root-{suite}")
    log.unlink(missing_ok=True)
    unfinished = root.with_name(root.name + ".unfinished")
    subprocess.run([*AS_ROOT, "rm", "-rf", str(unfinished)], check=True)
    release, _, architecture = suite.partition("-")
    of = [f"--arch={architecture}"] if architecture else []
    with scripts_for(release) as folder:
        debootstrap = ["env", f"DEBOOTSTRAP_DIR={folder}", "debootstrap", "--variant=minbase"]
        options = [*of, "--include=ca-certificates", release, str(unfinished)]
        needs = "it needs Debian's mirror, and the rights to mount and to make devices"
        must(log, [*AS_ROOT, *debootstrap, *options], f"debootstrap {suite} failed; {needs}")
    subprocess.run([*AS_ROOT, "mv", str(unfinished), str(root)], check=True)


@contextmanager
def scripts_for(suite: str) -> Iterator[Path]:
    """A folder of debootstrap's scripts that knows the suite: its own, or a copy with sid's."""
    if (SCRIPTS / "scripts" / suite).exists():
        yield SCRIPTS
        return
    with tempfile.TemporaryDirectory(prefix="nbd-debootstrap-") as name:
        folder = Path(name, "debootstrap")
        shutil.copytree(SCRIPTS, folder, symlinks=True)
        (folder / "scripts" / suite).symlink_to("sid")
        yield folder


def derived(suite: str, purpose: str, packages: Sequence[str] = ()) -> Path:
    """A copy of a bare root for one purpose, with some more packages."""
    source = bare(suite)
    root = cache() / f"{suite}-{purpose}"
    with locked(root.name):
        if root.is_dir():
            return root
        log = log_path(f"root-{root.name}")
        log.unlink(missing_ok=True)
        copy = root.with_name(root.name + ".unfinished")
        subprocess.run([*AS_ROOT, "rm", "-rf", str(copy)], check=True)
        must(log, [*AS_ROOT, "cp", "-a", "--reflink=auto", source, copy], f"no copy of {source}")
        if packages:
            say(f"{root.name}: installing {' '.join(packages)}")
            install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
            # The lists of debootstrap are there, if the mirror has no newer ones.
            logged(log, entering(copy, ["apt-get", "update"]))
            must(log, entering(copy, install), f"{root.name}: cannot install {packages}")
        subprocess.run([*AS_ROOT, "mv", str(copy), str(root)], check=True)
    return root


def lend_checkout(root: Path) -> None:
    """Copy the sources into a root as they are now; what was built there is kept for reuse."""
    target = root / CHECKOUT
    subprocess.run([*AS_ROOT, "mkdir", "-p", str(target)], check=True)
    stale = ["-mindepth", "1", "-maxdepth", "1", "!", "-name", ".cache"]
    remove = [*AS_ROOT, "find", str(target), *stale, "-exec", "rm", "-rf", "{}", "+"]
    subprocess.run(remove, check=True)
    excludes = [f"--exclude={name}" for name in NOT_COPIED]
    pack = ["tar", "-C", str(ROOT), *excludes, "-cf", "-", "."]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
        unpack = [*AS_ROOT, "tar", "-C", str(target), "--no-same-owner", "-xf", "-"]
        subprocess.run(unpack, stdin=packing.stdout, check=True)


def check_in_root(
    suite: str, flags: Sequence[str], options: Sequence[str], wheel: Path | None
) -> list[Outcome]:
    """Run the command of this checkout in a Debian root, and return its outcomes."""
    root = derived(suite, "check")
    with locked(root.name):
        lend_checkout(root)
        say(f"{suite}: ./run check in {root}")
        report = CHECKOUT / ".cache" / "outcomes.json"
        subprocess.run([*AS_ROOT, "rm", "-f", str(root / report)], check=True)
        if wheel:
            copy_into(root, wheel, CHECKOUT / wheel.name)
            flags = [*flags, f"--wheel=/{CHECKOUT / wheel.name}"]
        command = [f"/{CHECKOUT}/run", "check", f"--json=/{report}", *flags, "--", *options]
        run_showing(suite, entering(root, command))
        if not (root / report).is_file():
            raise Failure(f"./run check failed in {root}, for the reason above")
        outcomes = [Outcome(**fields) for fields in json.loads((root / report).read_text())]
    for outcome in outcomes:
        outcome.debian = suite
    return outcomes


def run_showing(suite: str, command: Sequence[str]) -> None:
    """Run a command of ./run in a root, its lines marked as that root's; its sum is not shown."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.rstrip().endswith(" failed") or ":" in line:
                say(f"  {suite} | {line.rstrip()}")
