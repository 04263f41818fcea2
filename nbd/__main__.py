# SPDX-License-Identifier: LGPL-2.0-or-later
"""`python -m nbd` is nbdsh."""

from __future__ import annotations

from nbd.shell import main

main()
