# SPDX-License-Identifier: LGPL-2.0-or-later
"""The programs that are compared, and how one run of a workload is started in each."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import copies
from plan import Workload
from programs import call

HERE = Path(__file__).resolve().parent
#: The programs that whole copies are compared with.
COPIERS = ("nbdcopy", "qemu-img")

Sample = dict[str, Any]
Runner = Callable[[Workload, dict[str, str]], Sample]

_IMPORT = "import time; t = time.perf_counter(); import nbd; print(time.perf_counter() - t)"
_DESCRIBE = """
import json, platform, nbd
about = {
    "python": platform.python_implementation() + " " + platform.python_version(),
    "libnbd": nbd.NBD().get_version(),
}
if hasattr(nbd, "open"):  # libnbd's own module has none
    import _cffi_backend
    about["backend"] = "cffi " + _cffi_backend.__version__
print(json.dumps(about))
"""


@dataclass(frozen=True)
class Subject:
    """A program that is measured: a column of the tables."""

    name: str
    run: Runner
    about: dict[str, str]

    @property
    def is_copier(self) -> bool:
        """Whether it runs whole copies and nothing else."""
        return self.name in COPIERS

    def runs(self, workload: Workload) -> bool:
        """Whether the workload makes sense for this subject."""
        if workload.is_whole_copy:
            if self.name == "qemu-img":
                return "gzip" not in workload.servers
            return self.is_copier or ("backend" in self.about and not self.name.endswith("abi"))
        return not self.is_copier and ("python" in self.about or not workload.python_only)


def interpreter(text: str) -> tuple[str, str]:
    """Parse NAME=PYTHON; the path is made absolute, because each run has a folder of its own."""
    name, _, python = text.partition("=")
    found = shutil.which(python)
    if found is None:
        raise ArgumentTypeError(f"no program {python!r} was found; give NAME=PYTHON")
    return name, os.path.abspath(found)


def _measure_import(python: str, launches: int, folder: Path) -> Sample:
    times = [float(call([python, "-c", _IMPORT], folder)) for _ in range(launches)]
    return {"operations": 1, "wall": statistics.median(times)}


def python_subject(name: str, python: str, folder: Path) -> Subject:
    """A Python interpreter, with the ``nbd`` that it imports outside of any source tree."""

    def run(workload: Workload, uris: dict[str, str]) -> Sample:
        if workload.kind == "import":
            return _measure_import(python, workload.operations, folder)
        if workload.is_whole_copy:
            return copies.measure(python, workload, uris)
        script = str(HERE / "workloads.py")
        outcome: Sample = json.loads(call([python, script, *workload.arguments(uris)], folder))
        return outcome

    about: dict[str, str] = json.loads(call([python, "-c", _DESCRIBE], folder))
    return Subject(name, run, about)


def limit_subject(folder: Path) -> Subject:
    """The program limit.c, which is built first."""
    program = str(folder / "limit")
    flags = call(["pkg-config", "--cflags", "--libs", "libnbd"]).split()
    call(["cc", "-std=c11", "-O2", str(HERE / "limit.c"), "-o", program, *flags])

    def run(workload: Workload, uris: dict[str, str]) -> Sample:
        outcome: Sample = json.loads(call([program, *workload.arguments(uris)], folder))
        return outcome

    return Subject("C", run, {"libnbd": call(["pkg-config", "--modversion", "libnbd"]).strip()})


def copier_subjects() -> list[Subject]:
    """The other programs that copy disks, as far as they are installed."""
    return [
        Subject(name, partial(copies.measure, name), {"": call([name, "--version"]).split("\n")[0]})
        for name in filter(shutil.which, COPIERS)
    ]
