# SPDX-License-Identifier: LGPL-2.0-or-later
"""The limit on the memory of dropped nbd.Buffer objects that is kept for new ones."""

from __future__ import annotations

from nbd._binding.memory import set_pool_limit

__all__ = ["set_pool_limit"]
