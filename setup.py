# SPDX-License-Identifier: LGPL-2.0-or-later
"""Build the package of setup.cfg: the generated modules, and the shim for one mode of cffi."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build_nbd
from generator.library import BuildError

try:
    build = build_nbd.prepare(Path("build") / "generated")
except BuildError as reason:
    sys.exit(f"libnbd-cffi cannot be built: {reason}")


class BuildModules(build_py):
    """Add the generated modules to the package."""

    def run(self) -> None:
        super().run()
        for name, text in build_nbd.python_modules(build).items():
            target = Path("" if self.editable_mode else self.build_lib, "nbd", "_binding")
            target.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text, encoding="utf-8")


class BuildShim(build_ext):
    """ABI mode's shim is a plain shared library: its file name has no tag of a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("nbdshim"):
            return str(Path(*fullname.split("."))) + ".so"
        return str(super().get_ext_filename(fullname))  # type: ignore[no-untyped-call]


class AnyPythonWheel(bdist_wheel):
    """ABI mode's wheel works with every Python of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


commands: dict[str, Any] = {"build_py": BuildModules, "build_ext": BuildShim}
options = {}
if build.mode == "API":
    extension = build_nbd.api_builder(build).distutils_extension(str(build.folder))
    if sysconfig.get_config_var("Py_GIL_DISABLED"):  # free-threaded CPython has no limited API
        extension.define_macros.append(("_CFFI_NO_LIMITED_API", None))
    elif sys.implementation.name == "cpython":
        extension.py_limited_api = True  # type: ignore[attr-defined]
        extension.define_macros.append(("Py_LIMITED_API", "0x03090000"))
        options["bdist_wheel"] = {"py_limited_api": "cp39"}
else:
    extension = Extension(
        "nbd._binding.nbdshim",
        sources=build.sources,
        include_dirs=build.include_dirs,
        extra_compile_args=build.compile_args,
        extra_link_args=[build_nbd.LINKED_AT_ONCE, *build.library.libs],
    )
    commands["bdist_wheel"] = AnyPythonWheel

setup(
    ext_modules=[extension],
    cmdclass=commands,
    options=options,
)
