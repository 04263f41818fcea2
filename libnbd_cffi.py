# SPDX-License-Identifier: LGPL-2.0-or-later
"""The command nbdsh, in a module whose name no other package has.

Two other packages provide a module `nbd`: libnbd's own Python module, and one on PyPI that has
nothing to do with block devices.  If Python finds one of them instead of ours, this says so.
"""

from __future__ import annotations

import os
import sys

REINSTALL = "pip install --force-reinstall --no-deps libnbd-cffi"


def stranger(folder: str) -> str | None:
    """Explain which `nbd` is imported instead of the one in a folder, and what to type."""
    import nbd

    ours = os.path.join(folder, "nbd")
    found: str | None = getattr(nbd, "__file__", None)
    if found is None:
        return (
            f"a part of libnbd-cffi is missing in {ours}. Perhaps another package called nbd was "
            f"uninstalled. Type: {REINSTALL}"
        )
    where = os.path.dirname(os.path.abspath(found))
    if os.path.realpath(where) != os.path.realpath(ours):
        return (
            f"Python finds another nbd, {found}, before libnbd-cffi's, {ours}. Remove {where} from "
            "PYTHONPATH, or from wherever else it is added to sys.path"
        )
    if not hasattr(nbd, "NBD"):
        return (
            f"{found} belongs to PyPI's unrelated package nbd, installed over libnbd-cffi. "
            f"Type: pip uninstall nbd; {REINSTALL}"
        )
    return None


def main() -> None:
    """Run nbdsh with our nbd; exit with an explanation if another one is imported."""
    try:
        reason = stranger(os.path.dirname(os.path.abspath(__file__)))
    except ImportError as error:
        reason = str(error)
    if reason:
        sys.exit(f"nbdsh: {reason}")
    from nbd.shell import main as shell

    shell()


if __name__ == "__main__":
    main()
