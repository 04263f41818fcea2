"""The checkout that the package under test was built from, for tests of what is not installed.

Importing this makes `generator` importable.  The checkout has a folder `nbd` too, without what the
build adds to it: so the installed package is imported first, and the path is as before afterwards.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

import nbd  # noqa: F401 - the installed one, before the checkout is on the path

CHECKOUT = Path(os.environ.get("NBD_CHECKOUT") or Path(__file__).resolve().parents[2])

if not (CHECKOUT / "generator" / "__init__.py").is_file():
    pytest.skip(f"there is no generator in {CHECKOUT}", allow_module_level=True)
pytest.importorskip("pycparser", reason="pycparser is not installed")

sys.path.append(str(CHECKOUT))
importlib.import_module("generator")
sys.path.remove(str(CHECKOUT))
