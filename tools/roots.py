# SPDX-License-Identifier: LGPL-2.0-or-later
"""Debian roots: made once with debootstrap, kept outside the checkout, entered with chroot.

debootstrap makes SUITE-bare; the root for each purpose is a copy of it.  When a command in a root
ends, its mounts and its remaining processes end with it.  Suites like "trixie-arm64" are for
another processor, whose programs qemu runs.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from console import ROOT, Failure, locked, logged, must, new_log, output, say
from environments import tools
from suite import Outcome

CHECKOUT = Path("srv/libnbd-cffi")  # the copy of this checkout in a root
NOT_COPIED = (".git", ".cache", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
SCRIPTS = Path("/usr/share/debootstrap")
FOREIGN_PROGRAMS = Path("/proc/sys/fs/binfmt_misc")
QEMU_NAMES = {"arm64": "aarch64"}
BESIDE = {"forky": "python3.15"}  # a CPython besides the suite's own; tools/packages has it

AS_ROOT: tuple[str, ...] = () if os.geteuid() == 0 else ("sudo",)

# The command has its own namespaces: no other process sees its mounts, and they end with it.
_ENTER = """
mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"
"""
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")


def cache() -> Path:
    """The folder that contains the roots."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "libnbd-cffi" / "roots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
    """Give a root this machine's access to the network.

    It gets the name servers, the proxies, pip's settings, and the certificate authorities that this
    machine trusts.  Settings of pip that name files of this machine are left out.
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
    """This machine's configuration of pip, as environment variables."""
    pip = tools("pip") / "pip"
    listed = output([pip, "config", "list"], "pip cannot list its configuration")
    settings: dict[str, str] = {}
    # Variables are last, because they override files.
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
    """Register qemu with the kernel for the programs of another processor, until the next boot.

    Raises:
        Failure: This machine cannot run them; the message says why.
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
        raise Failure(f"this machine's kernel cannot run programs for {name} with qemu")


def bare(suite: str) -> Path:
    """Return a root that has only what debootstrap installs, and the certificates for HTTPS."""
    root = cache() / f"{suite}-bare"
    able_to_run(suite)
    with locked(root):
        if not root.is_dir():
            say(f"making the Debian root {root}")
            bootstrap(suite, root)
    return root


def bootstrap(suite: str, root: Path) -> None:
    """Run debootstrap in a temporary folder, which is renamed when it is complete."""
    log = new_log(f"root-{suite}")
    unfinished = root.with_name(root.name + ".unfinished")
    subprocess.run([*AS_ROOT, "rm", "-rf", str(unfinished)], check=True)
    release, _, architecture = suite.partition("-")
    foreign = [f"--arch={architecture}"] if architecture else []
    with scripts_for(release) as folder:
        debootstrap = ["env", f"DEBOOTSTRAP_DIR={folder}", "debootstrap", "--variant=minbase"]
        options = [*foreign, "--include=ca-certificates", release, str(unfinished)]
        needs = "it needs a Debian mirror, and permission to mount and to make devices"
        must(log, [*AS_ROOT, *debootstrap, *options], f"debootstrap {suite} failed; {needs}")
    subprocess.run([*AS_ROOT, "mv", str(unfinished), str(root)], check=True)


@contextmanager
def scripts_for(suite: str) -> Iterator[Path]:
    """Yield debootstrap's scripts; if they lack the suite, a copy that has sid's script for it."""
    if (SCRIPTS / "scripts" / suite).exists():
        yield SCRIPTS
        return
    with tempfile.TemporaryDirectory(prefix="nbd-debootstrap-") as name:
        folder = Path(name, "debootstrap")
        shutil.copytree(SCRIPTS, folder, symlinks=True)
        (folder / "scripts" / suite).symlink_to("sid")
        yield folder


def derived(suite: str, purpose: str, packages: Sequence[str] = ()) -> Path:
    """Return a copy of a bare root for one purpose, with more packages."""
    source = bare(suite)
    root = cache() / f"{suite}-{purpose}"
    with locked(root):
        if root.is_dir():
            return root
        log = new_log(f"root-{root.name}")
        copy = root.with_name(root.name + ".unfinished")
        subprocess.run([*AS_ROOT, "rm", "-rf", str(copy)], check=True)
        must(
            log,
            [*AS_ROOT, "cp", "-a", "--reflink=auto", source, copy],
            f"{source} cannot be copied",
        )
        if packages:
            say(f"{root.name}: installing {' '.join(packages)}")
            install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
            # If this fails, the package lists of debootstrap are still usable.
            logged(log, entering(copy, ["apt-get", "update"]))
            must(log, entering(copy, install), f"{root.name}: cannot install {packages}")
        subprocess.run([*AS_ROOT, "mv", str(copy), str(root)], check=True)
    return root


def lend_checkout(root: Path) -> None:
    """Copy the sources into a root; what was built there before is kept for reuse."""
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
    """Run ./run check in a Debian root, and return the outcomes."""
    root = derived(suite, "check")
    with locked(root):
        lend_checkout(root)
        say(f"{suite}: ./run check in {root}")
        report = CHECKOUT / ".cache" / "outcomes.json"
        subprocess.run([*AS_ROOT, "rm", "-f", str(root / report)], check=True)
        if wheel:
            copy_into(root, wheel, CHECKOUT / wheel.name)
            flags = [*flags, f"--wheel=/{CHECKOUT / wheel.name}"]
        if suite in BESIDE:
            flags = [*flags, f"--beside={BESIDE[suite]}"]
        command = [f"/{CHECKOUT}/run", "check", f"--json=/{report}", *flags, "--", *options]
        run_showing(suite, entering(root, command))
        if not (root / report).is_file():
            raise Failure(f"./run check failed in {root}; the reason is above")
        outcomes = [Outcome(**fields) for fields in json.loads((root / report).read_text())]
    for outcome in outcomes:
        outcome.debian = suite
    return outcomes


def run_showing(suite: str, command: Sequence[str]) -> None:
    """Run a command of ./run in a root; prefix its lines with the suite, and drop its last line."""
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
