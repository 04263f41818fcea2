# SPDX-License-Identifier: LGPL-2.0-or-later
"""What a self-contained wheel has inside, as CycloneDX writes it (PEP 770 says where it lies)."""

from __future__ import annotations

import json
from collections.abc import Iterable

from targets import Part


def bill_of_materials(wheel: str, parts: Iterable[Part]) -> str:
    """The text for a wheel NAME-VERSION; the same parts give the same text."""
    name, _, version = wheel.partition("-")
    ours = f"pkg:pypi/{name.replace('_', '-')}@{version}"
    ordered = sorted(parts, key=lambda part: part.name)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.4",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": ours,
                "name": name.replace("_", "-"),
                "version": version,
                "purl": ours,
            }
        },
        "components": [
            {
                "type": "library",
                "bom-ref": part.purl,
                "name": part.name,
                "version": part.version,
                "purl": part.purl,
            }
            for part in ordered
        ],
        "dependencies": [
            {"ref": ours, "dependsOn": [part.purl for part in ordered]},
            *({"ref": part.purl} for part in ordered),
        ],
    }
    return json.dumps(document, indent=1) + "\n"
