"""Locate the checkout, for tests of files that are not installed.

Importing this module makes `generator` importable. The checkout also has a folder `nbd`, which
lacks the generated modules. Therefore the installed package is imported first, and sys.path is
restored afterwards.
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
