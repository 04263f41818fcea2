# SPDX-License-Identifier: LGPL-2.0-or-later
"""What build_nbd.py generates, in a folder for the tools that read or compile it."""

from __future__ import annotations

from pathlib import Path

from console import CACHE, ROOT, clean_environment, log_path, must


def generate(python: Path, mode: str) -> Path:
    """Write the generated C and Python into .cache/generated-MODE and return that folder."""
    folder = CACHE / f"generated-{mode}"
    folder.mkdir(parents=True, exist_ok=True)
    log = log_path("generate")
    log.unlink(missing_ok=True)
    must(
        log,
        [python, ROOT / "build_nbd.py", folder],
        "build_nbd.py failed",
        environ=clean_environment(NBD_CFFI_MODE=mode),
    )
    return folder
