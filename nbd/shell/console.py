# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbdsh without -c: an interactive session on a terminal, or statements read from a pipe."""

from __future__ import annotations

import builtins
import code
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import nbd
from nbd.shell import hexdump

# A longer result is shown as a hexdump.  Up to this length, repr() fits on a few lines.
_SHORT = 64
_HISTORY_LENGTH = 1000


def run(scope: dict[str, object], handle: nbd.NBD | None) -> None:
    """Run the lines that the user types, or those of standard input, in the namespace `scope`."""
    if sys.stdin and sys.stdin.isatty():
        _interact(scope, _banner(handle))
    else:
        _feed(scope)


def _interact(scope: dict[str, object], banner: str) -> None:
    sys.ps1, sys.ps2 = "nbd> ", "...  "
    sys.displayhook = _display
    # PyPy's line editor fails on a dumb terminal.
    with nullcontext() if _dumb() else _line_editing(scope):
        code.interact(banner, local=scope, exitmsg="")


def _feed(scope: dict[str, object]) -> None:
    """Run standard input as the interactive interpreter does: show results, continue after errors.

    It prints no banner and no prompt, because nobody would read them.
    """
    console = code.InteractiveConsole(scope)
    for line in sys.stdin or ():
        console.push(line.rstrip("\n"))
    # An empty line, or the end of the input, ends a block of statements.
    if console.push(""):
        print("nbdsh: standard input ends inside a statement", file=sys.stderr)
        sys.exit(1)


def _banner(handle: nbd.NBD | None) -> str:
    state, calls = _situation(handle)
    names = [("nbd", "the module; help(nbd) is its manual"), ("h", state)]
    calls += [
        ("h.get_size()", "size of the export in bytes"),
        ("h.pread(512, 0)", "512 bytes from offset 0"),
        ("exit() or Ctrl-D", "leave"),
    ]
    return "\n".join(
        [
            "",
            f"nbdsh, a Python shell for NBD (libnbd {nbd.__version__})",
            *(f"  {name:<5} {what}" for name, what in names),
            "",
            *(f"  {call:<34} # {what}" for call, what in calls),
            "",
        ]
    )


def _situation(handle: nbd.NBD | None) -> tuple[str, list[tuple[str, str]]]:
    """Describe `h`, and the calls that are needed before it is connected."""
    connect = ('h.connect_uri("nbd://localhost")', "connect to a server")
    go = ("h.opt_go()", "end the negotiation")
    if handle is None:
        return "not there yet", [("h = nbd.NBD()", "make a handle"), connect]
    if handle.aio_is_created():
        calls = [connect, go] if handle.get_opt_mode() else [connect]
        return "a handle, not connected", calls
    if handle.aio_is_negotiating():
        return "a handle, negotiating options", [go]
    return "a handle, connected", []


def _display(value: object) -> None:
    """Show a result: a long bytes-like object as a hexdump, anything else as Python does."""
    view = _view(value)
    if view is None:
        sys.__displayhook__(value)
        return
    builtins._ = value  # type: ignore[attr-defined]
    for line in hexdump.dump(view, colour=_colour()):
        print(line)


def _view(value: object) -> memoryview | None:
    """Return the bytes of `value` if it is shown as a hexdump."""
    shared = value.to_buffer() if isinstance(value, nbd.Buffer) else value
    if not isinstance(shared, (bytes, bytearray, memoryview)):
        return None
    view = memoryview(shared)
    return view.cast("B") if view.nbytes > _SHORT and view.c_contiguous else None


def _colour() -> bool:
    return not os.environ.get("NO_COLOR") and not _dumb() and sys.stdout.isatty()


def _dumb() -> bool:
    return os.environ.get("TERM", "dumb") == "dumb"


@contextmanager
def _line_editing(scope: dict[str, object]) -> Iterator[None]:
    """Give the prompt line editing, completion and history, if this Python has readline."""
    try:
        import readline
        import rlcompleter
    except ImportError:
        yield
        return
    readline.set_completer(rlcompleter.Completer(scope).complete)
    editline = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
    readline.set_history_length(_HISTORY_LENGTH)
    path = _history_path()
    if os.path.isfile(path):  # reading from a pipe, for example, could block
        with suppress(OSError):
            readline.read_history_file(path)
    try:
        yield
    finally:
        # If the history cannot be written, the session still ends without an error.
        with suppress(OSError), _private_files():
            _make_private(path)
            readline.write_history_file(path)


def _history_path() -> str:
    # The default is the home directory: it exists, and shells and Python keep their history there.
    # Users who have set XDG_STATE_HOME want it in that folder.
    path = os.environ.get("NBDSH_HISTORY")
    if path is None:
        state = os.environ.get("XDG_STATE_HOME")
        path = os.path.join(state, "nbdsh_history") if state else "~/.nbdsh_history"
    return os.path.abspath(os.path.expanduser(path))


@contextmanager
def _private_files() -> Iterator[None]:
    """Let only the user read new files, whatever the umask is: commands can contain passwords.

    readline writes a new file and renames it, so the mode of the old file has no effect.
    """
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def _make_private(path: str) -> None:
    """Create a file unless it exists, and let only the user read and write it.

    Raises:
        OSError: That failed, or the name belongs to a pipe, a device or the like.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file")
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    # O_NONBLOCK: the file may have been replaced by a pipe since the check above, and open of that
    # would block.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
