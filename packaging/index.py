# SPDX-License-Identifier: LGPL-2.0-or-later
"""A package index of dist/ for a file share or a web server (PEP 503)."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable
from pathlib import Path

PROJECT = "libnbd-cffi"

_PAGE = """<!DOCTYPE html>
<html>
<head><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head>
<body>
{links}
</body>
</html>
"""


def write_index(folder: Path, distributions: Iterable[Path]) -> Path:
    """Write FOLDER/simple, which links to the distributions in the folder; returns its path."""
    simple = folder / "simple"
    (simple / PROJECT).mkdir(parents=True)
    top = f'<a href="{PROJECT}/">{PROJECT}</a>'
    (simple / "index.html").write_text(_PAGE.format(title="Packages", links=top))
    links = "\n".join(map(link, sorted(distributions)))
    page = _PAGE.format(title=f"Files of {PROJECT}", links=links)
    (simple / PROJECT / "index.html").write_text(page)
    return simple


def link(distribution: Path) -> str:
    """The link to a file, with its checksum."""
    name = html.escape(distribution.name)
    digest = hashlib.sha256(distribution.read_bytes()).hexdigest()
    return f'<a href="../../{name}#sha256={digest}">{name}</a><br>'
