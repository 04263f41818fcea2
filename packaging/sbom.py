# SPDX-License-Identifier: LGPL-2.0-or-later
"""The SBOM of a bundled wheel, in CycloneDX's format; PEP 770 defines its place in the wheel."""

from __future__ import annotations

import json
from collections.abc import Iterable

from targets import Part


def component(name: str, version: str, purl: str) -> dict[str, str]:
    """Describe one library."""
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def bill_of_materials(wheel: str, parts: Iterable[Part]) -> str:
    """Return the text for a wheel NAME-VERSION; it is the same whenever the parts are the same."""
    name, _, version = wheel.replace("_", "-").rpartition("-")
    ours = f"pkg:pypi/{name}@{version}"
    ordered = sorted(parts, key=lambda part: part.name)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.4",
        "version": 1,
        "metadata": {"component": component(name, version, ours)},
        "components": [component(part.name, part.version, part.purl) for part in ordered],
        "dependencies": [
            {"ref": ours, "dependsOn": [part.purl for part in ordered]},
            *({"ref": part.purl} for part in ordered),
        ],
    }
    return json.dumps(document, indent=1) + "\n"
