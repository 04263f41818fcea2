# SPDX-License-Identifier: LGPL-2.0-or-later
"""The cffi build script: finds libnbd, runs the generator, passes the cdef and the shim to cffi.

setup.py calls it.  By hand, `python build_nbd.py FOLDER` writes the generated files into a folder.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from cffi import FFI

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:  # a build backend does not put the project on the path
    sys.path.insert(0, str(ROOT))

from generator.calls import load_documentation  # noqa: E402
from generator.emit_build import build_module  # noqa: E402
from generator.emit_cdef import cdef, extern_python  # noqa: E402
from generator.emit_constants import constants_module  # noqa: E402
from generator.emit_glue_header import glue_header  # noqa: E402
from generator.emit_glue_source import glue_source  # noqa: E402
from generator.emit_methods import methods_module  # noqa: E402
from generator.emit_upcalls import upcalls_module  # noqa: E402
from generator.library import BuildError, Library, find_library  # noqa: E402
from generator.model import Header  # noqa: E402
from generator.preprocess import preprocess  # noqa: E402
from generator.read import read  # noqa: E402
from generator.waiting import stoppable  # noqa: E402

CSRC = ROOT / "csrc"
SHIM = sorted(CSRC.glob("*.c"))
INCLUDES = '#include "nbdshim.h"\n#include "nbdglue.h"\n'
STRICT = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra")
LINKED_AT_ONCE = "-Wl,-z,now"  # a function that libnbd lacks is an error at import, not at a call


class Build(NamedTuple):
    """The inputs of one build."""

    mode: str
    library: Library
    header: Header
    folder: Path
    bundled: bool  # the wheel will contain libnbd and the libraries that it needs

    @property
    def sources(self) -> list[str]:
        return [*map(os.path.relpath, SHIM), str(self.folder / "nbdglue.c")]

    @property
    def compile_args(self) -> list[str]:
        bundled = ["-DNBDSHIM_BUNDLED"] if self.bundled else []
        return [*STRICT, *bundled, *self.library.cflags]

    @property
    def include_dirs(self) -> list[str]:
        return [str(CSRC), str(self.folder)]


def chosen_mode() -> str:
    """API where cffi can compile against Python.h, else ABI; NBD_CFFI_MODE overrides."""
    asked = os.environ.get("NBD_CFFI_MODE", "").upper()
    if asked in ("API", "ABI"):
        return asked
    if asked:
        raise BuildError(f"NBD_CFFI_MODE is {asked.lower()!r}; it can be api or abi")
    return "API" if Path(sysconfig.get_paths()["include"], "Python.h").is_file() else "ABI"


def prepare(folder: Path) -> Build:
    """Read libnbd.h and write the C glue into a folder.

    Raises:
        BuildError: A tool or libnbd's header is missing; the message says how to get it.
    """
    library = find_library()
    header = stoppable(read(library.header))
    for name, reason in header.unbound:
        print(f"warning: {name} is not bound: {reason}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nbdglue.h").write_text(glue_header(header), encoding="utf-8")
    (folder / "nbdglue.c").write_text(glue_source(header), encoding="utf-8")
    bundled = os.environ.get("NBD_CFFI_BUNDLED") == "1"
    return Build(chosen_mode(), library, header, folder, bundled)


def python_modules(build: Build) -> dict[str, str]:
    """The generated modules of the package, by file name."""
    modules = {
        "build.py": build_module(build.mode, build.library.version, build.bundled),
        "constants.py": constants_module(build.header),
        "upcalls.py": upcalls_module(build.header),
        "methods.py": methods_module(build.header, load_documentation()),
    }
    if build.mode == "ABI":
        modules["abi.py"] = abi_module(build)
    return modules


def declarations(build: Build) -> str:
    """The cdef that both modes share."""
    return cdef(preprocess(build.folder / "nbdglue.h", f"-I{CSRC}"))


def abi_module(build: Build) -> str:
    """abi.py: the cdef as cffi's out-of-line ABI mode stores it."""
    ffi = FFI()
    ffi.cdef(declarations(build))
    ffi.set_source("nbd._binding.abi", None)
    target = build.folder / "abi.py"
    ffi.emit_python_code(str(target))
    return target.read_text(encoding="utf-8")


def api_builder(build: Build) -> FFI:
    """The FFI that compiles nbd._binding.api, the shim included."""
    ffi = FFI()
    ffi.cdef(declarations(build))
    ffi.cdef(extern_python(build.header))
    ffi.set_source(
        "nbd._binding.api",
        INCLUDES,
        sources=build.sources,
        include_dirs=build.include_dirs,
        extra_compile_args=build.compile_args,
        extra_link_args=[LINKED_AT_ONCE, *build.library.libs],
    )
    return ffi


def main() -> None:
    """Write everything that is generated into the folder given as argument."""
    if len(sys.argv) != 2:
        sys.exit("usage: python build_nbd.py FOLDER")
    try:
        build = prepare(Path(sys.argv[1]))
    except BuildError as reason:
        sys.exit(f"build_nbd.py: {reason}")
    for name, text in python_modules(build).items():
        (build.folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
