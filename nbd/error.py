# SPDX-License-Identifier: LGPL-2.0-or-later
"""The exceptions of the package."""

from __future__ import annotations

from nbd._ffi import one_for_all_imports


@one_for_all_imports
class Error(Exception):
    """A libnbd call failed.

    Attributes:
        string: What went wrong, for people to read.
        errnum: The errno, such as 107; 0 if the failure had none.
        errno: The errno's name, such as "ENOTCONN"; None if there is none.

    Example:
        >>> try:
        ...     nbd.NBD().pread(512, 0)
        ... except nbd.Error as error:
        ...     print(error.errno)
        ENOTCONN

    C: nbd_get_error, nbd_get_errno, since libnbd 1.0.
    """

    __module__ = "nbd"

    @property
    def string(self) -> str:
        """What went wrong, for people to read."""
        message: str = self.args[0] if self.args else ""
        return message

    @property
    def errnum(self) -> int:
        """The errno, or 0 if the failure had none."""
        number: int = self.args[1] if len(self.args) > 1 else 0
        return number

    @property
    def errno(self) -> str | None:
        """The errno's name, or None if there is none."""
        import errno

        return errno.errorcode.get(self.errnum)

    def __str__(self) -> str:
        return f"{self.string} ({self.errno})" if self.errno else f"{self.string}"


@one_for_all_imports
class ClosedHandle(ValueError):
    """A method was called on a handle that is closed.

    Raised by every method after nbd.NBD.close, a second close included.  Make a new handle with
    nbd.NBD() instead.
    """

    __module__ = "nbd"
