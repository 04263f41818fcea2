"""A mark for tests that fork the process of pytest."""

from __future__ import annotations

import pytest

#: CPython warns about a fork beside threads.  Since 3.15 it also counts the thread that enforces
#: pytest's faulthandler_timeout.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
