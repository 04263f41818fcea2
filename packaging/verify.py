# SPDX-License-Identifier: LGPL-2.0-or-later
"""Install a distribution into a fresh environment, here or in a bare root, and use it there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from console import Failure, clean_environment, locked, must, new_log, show_end, shown
from roots import AS_ROOT, BESIDE, derived, entering
from servers import servers

PROBE = Path(__file__).resolve().with_name("probe.py")
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15")


class Found(NamedTuple):
    """What an installed distribution reported."""

    where: str
    mode: str = ""
    libnbd: str = ""  # empty if it could not be run
    gnutls: str = ""


def pythons() -> list[str]:
    """One CPython of every version that is installed here, by Debian or by pyenv."""
    found: dict[str, str] = {}
    for version in PYTHONS:
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        for candidate in (f"/usr/bin/python{version}", *map(str, kept)):
            if os.access(candidate, os.X_OK):
                found.setdefault(version, candidate)
    return list(found.values())


def verify_here(distribution: Path, python: str, mode: str) -> Found:
    """Install into a fresh environment and run from another folder."""
    log = new_log(f"verify-{distribution.name}-{python.strip('/').replace('/', '-')}")
    environ = clean_environment(NBD_CFFI_MODE=mode.lower())
    with tempfile.TemporaryDirectory(prefix="nbd-verify-") as name:
        folder = Path(name)
        fresh = folder / "environment" / "bin" / "python"
        make = [python, "-m", "venv", folder / "environment"]
        install = [fresh, "-m", "pip", "install", "--no-input", distribution]
        for step in (make, install):
            failure = f"{distribution.name} cannot be installed with {python}"
            must(log, step, failure, environ=environ, cwd=folder)
        text = probed([str(fresh), str(PROBE)], folder, log)
    return checked(json.loads(text), mode)


def probed(command: Sequence[str], cwd: Path, log: Path) -> str:
    """Run the probe and return what it prints; Failure if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    if done.returncode != 0:
        show_end(log)
        raise Failure(f"the probe failed (log: {shown(log)})")
    return done.stdout


def checked(findings: dict[str, Any], mode: str) -> Found:
    """Convert the findings of the probe; Failure if they are not as expected."""
    match = re.search(r"\((\w+) (\d+\.\d+)\S*, cffi (\w+) mode\)", findings["version"])
    if match is None:
        raise Failure(f"python -m nbd --version prints something else: {findings['version']}")
    interpreter, version, found = match.groups()
    if found != mode:
        raise Failure(f"{findings['module']} is in {found} mode, not in {mode} mode")
    path = findings["libnbd_file"]
    origin = "its own" if "libnbd_cffi.libs" in path else "the system's"
    gnutls = re.search(r"^GnuTLS (\d[.\d]*)", findings["version"], re.MULTILINE)
    if gnutls is None:
        raise Failure(f"python -m nbd --version names no GnuTLS: {findings['version']}")
    libnbd = f"{findings['libnbd']}, {origin}"
    return Found(f"{interpreter} {version}", found, libnbd, gnutls.group(1))


# Install the wheel, and read from a TLS server without and with its authority in each of the files
# where distributions keep the authorities that they trust.
_INSIDE = """
set -e
python=$1 uris=$2 uri=$3 authority=$4
case $python in
/opt/python-*)  # for musl, without pip: Debian's pip chooses for it
    "$python" -m venv --without-pip /tmp/fresh
    architecture=${python#/opt/python-}
    set -- python3 -m pip install --target /tmp/fresh/lib/python3.*/site-packages \\
        --platform "musllinux_1_2_${architecture%%/*}"
    ;;
*)
    "$python" -m venv /tmp/fresh
    set -- /tmp/fresh/bin/python -m pip install
    ;;
esac
"$@" --no-input --no-cache-dir --find-links /tmp/offered --only-binary :all: libnbd-cffi
cd /
probe() {
    env -u SSL_CERT_FILE "$@"
}
for file in etc/ssl/certs/ca-certificates.crt etc/pki/tls/certs/ca-bundle.crt etc/ssl/cert.pem; do
    mkdir -p /etc/pki
    mount -t tmpfs none /etc/ssl
    mount -t tmpfs none /etc/pki
    if probe /tmp/fresh/bin/python /tmp/probe.py trust "$uri" 2>/dev/null; then
        echo "a server with an unknown authority is trusted" >&2
        exit 1
    fi
    mkdir -p "/${file%/*}"
    cp "$authority" "/$file"
    probe /tmp/fresh/bin/python /tmp/probe.py trust "$uri"
    umount /etc/ssl /etc/pki
done
probe SSL_CERT_FILE="$authority" /tmp/fresh/bin/python /tmp/probe.py trust "$uri"
probe /tmp/fresh/bin/python /tmp/probe.py "$uris"
"""


def installable(suite: str) -> Path:
    """A bare root with Debian's interpreters and their pip, but not with a PyPy that is too old."""
    names = ["python3"]
    if "-" not in suite and suite != "bullseye":
        names.append("pypy3")
    if suite in BESIDE:
        names.append(BESIDE[suite])
    return derived(suite, "python", [*names, *(f"{name}-venv" for name in names)])


def verify_in_root(root: Path, wheel: Path, offered: Sequence[Path], python: str) -> Found:
    """Let pip choose among wheels in a root; check that it chose this one, and use it."""
    suite = root.name.removesuffix("-python")
    log = new_log(f"verify-{wheel.stem}-{suite}-{Path(python).name}")
    with locked(root), servers(root) as running:
        temporary = root / "tmp"
        stale = [temporary / name for name in ("fresh", "offered", "probe.py")]
        subprocess.run([*AS_ROOT, "rm", "-rf", *map(str, stale)], check=True)
        subprocess.run([*AS_ROOT, "mkdir", str(temporary / "offered")], check=True)
        copy = [*AS_ROOT, "cp"]
        subprocess.run([*copy, *map(str, offered), str(temporary / "offered")], check=True)
        subprocess.run([*copy, str(PROBE), str(temporary)], check=True)
        arguments = [json.dumps(running.uris), running.x509, running.authority]
        inside = ["sh", "-c", _INSIDE, "sh", python, *arguments]
        text = probed(entering(root, inside), Path("/"), log)
    lines = text.splitlines()
    findings = json.loads(lines[-1])
    if not any(line.startswith("Processing ") and wheel.name in line for line in lines):
        raise Failure(f"{suite}: pip did not choose {wheel.name} (log: {shown(log)})")
    found = checked(findings, "ABI")
    if not found.libnbd.endswith("its own"):
        raise Failure(f"{suite}: libnbd came from {findings['libnbd_file']}")
    return found._replace(where=f"{suite} {found.where}")
