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
from pathlib import Path
from typing import Any

import copies
from plan import UVLOOP, Workload
from programs import call

HERE = Path(__file__).resolve().parent
#: The program that whole copies are compared with.
NBDCOPY = "nbdcopy -S0"

Sample = dict[str, Any]
Runner = Callable[[Workload, dict[str, str]], Sample]

_IMPORT = "import time; t = time.perf_counter(); import nbd; print(time.perf_counter() - t)"
_DESCRIBE = """
import json, platform, nbd
about = {
    "python": platform.python_implementation() + " " + platform.python_version(),
    "module": nbd.__file__,
    "libnbd": nbd.NBD().get_version(),
}
if hasattr(nbd, "open"):  # libnbd's own module has none
    import _cffi_backend
    about["backend"] = "cffi " + _cffi_backend.__version__
try:
    import uvloop
    about["uvloop"] = "uvloop " + uvloop.__version__
except ImportError:
    pass
print(json.dumps(about))
"""


@dataclass(frozen=True)
class Subject:
    """A program that is measured: a column of the tables."""

    name: str
    run: Runner
    about: dict[str, str]

    @property
    def is_nbdcopy(self) -> bool:
        """Whether it runs whole copies and nothing else."""
        return self.name == NBDCOPY

    def runs(self, workload: Workload) -> bool:
        """Whether the workload makes sense for this subject."""
        if workload.is_whole_copy or self.is_nbdcopy:
            return workload.is_whole_copy and ("backend" in self.about or self.is_nbdcopy)
        if workload.kind == UVLOOP:
            return "uvloop" in self.about
        return "python" in self.about or not workload.python_only


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
            return copies.measure([python, "-I", "-c", copies.COPY], workload, uris)
        script = str(HERE / "workloads.py")
        outcome: Sample = json.loads(call([python, script, *workload.arguments(uris)], folder))
        return outcome

    about: dict[str, str] = json.loads(call([python, "-c", _DESCRIBE], folder))
    return Subject(name, run, about)


def compile_limit(folder: Path) -> Path:
    """Build limit.c; returns the program."""
    program = folder / "limit"
    flags = call(["pkg-config", "--cflags", "--libs", "libnbd"]).split()
    source = str(HERE / "limit.c")
    call(["cc", "-std=c11", "-O2", "-pthread", source, "-o", str(program), *flags])
    return program


def limit_subject(folder: Path) -> Subject:
    """The program limit.c."""
    program = compile_limit(folder)

    def run(workload: Workload, uris: dict[str, str]) -> Sample:
        outcome: Sample = json.loads(call([str(program), *workload.arguments(uris)], folder))
        return outcome

    return Subject("C", run, {"libnbd": call(["pkg-config", "--modversion", "libnbd"]).strip()})


def nbdcopy_subjects() -> list[Subject]:
    """The program nbdcopy, if it is installed."""
    if not shutil.which("nbdcopy"):
        return []

    def run(workload: Workload, uris: dict[str, str]) -> Sample:
        return copies.measure(["nbdcopy", "--sparse=0"], workload, uris)

    return [Subject(NBDCOPY, run, {"libnbd": call(["nbdcopy", "--version"]).split()[-1]})]
