"""A folder of files named like installed modules, which report that they were imported."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path


def make(parent: Path) -> Path:
    """Make the folder, with a file for each module on the path."""
    folder = parent / "shadows"
    folder.mkdir()
    reported = parent / "told"
    reported.touch()
    for module in pkgutil.iter_modules(sys.path):
        file = folder / f"{module.name}.py"
        file.write_text(f"open({str(reported)!r}, 'a').write(f'{{__name__}}\\n')\n")
    return folder


def taken_from(folder: Path) -> list[str]:
    """Return the names of the modules that were imported from the folder."""
    return (folder.parent / "told").read_text().split()
