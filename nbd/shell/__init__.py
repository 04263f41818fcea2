# SPDX-License-Identifier: LGPL-2.0-or-later
"""The command line of nbdsh: its options, and the commands given with -c.

Test suites start nbdsh hundreds of times, so a run with -c imports little.  The interactive session
is in nbd.shell.console.  Modules that only an error or --version needs are imported where they are
used.

Commands can import from the current folder, as with `python -c`.  The shell and the package must
not, even if they import late: a file of the user may happen to be called code.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress

import nbd

TYPE_CHECKING = False  # typing's own constant would cost the import of typing
if TYPE_CHECKING:
    from typing import NoReturn

_SHORT_OPTIONS = ("-V", "-c", "-n", "-u", "-v")
_LONG_OPTIONS = (
    "--base-allocation",
    "--command",
    "--opt-mode",
    "--uri",
    "--verbose",
    "--version",
)

#: The modules that the shell and the package import late, and the modules that those import.
_LATER = (
    *("nbd._disks.file", "nbd.aio", "nbd.memory", "nbd.queue", "nbd.types"),
    *("ctypes", "encodings.idna", "logging", "random", "socket"),
)
_LATER_IN_A_SESSION = (
    *("nbd.shell.console", "readline", "rlcompleter", "subprocess"),
    # What help() imports: pydoc, the texts for keywords, and what its pager needs.
    *("pydoc", "pydoc_data.topics", "tempfile", "termios", "textwrap", "tty"),
)

# The text of every command that was run, by the file name in its frames.
_sources: dict[str, str] = {}


def main() -> None:
    """Run nbdsh on sys.argv; an exit status other than 0 is raised as SystemExit."""
    options = _parser().parse_args()
    steps: list[tuple[str, str]] = options.steps or []
    if options.n and any(kind != "command" for kind, _ in steps):
        _fail("error: -n option cannot be used with --base-allocation, --opt-mode or --uri")
    if options.version or options.short_options or options.long_options:
        print("\n".join(_answer(options)))
        return
    if options.verbose:
        os.environ["LIBNBD_DEBUG"] = "1"

    handle = None if options.n else _named_handle()
    scope = _scope(handle)
    is_interactive = not any(kind == "command" for kind, _ in steps)
    _import_from_here(is_interactive)
    _run(steps, handle, scope)
    if is_interactive:
        from nbd.shell import console

        console.run(scope, handle)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nbdsh",
        description="A Python shell for NBD (network block device) servers.",
        epilog="Without -c, nbdsh is interactive; help(nbd) is the manual page there.",
    )
    flag = parser.add_argument
    text = 'ask for the "base:allocation" meta context when connecting'
    _add_step(parser, "base-allocation", "--base-allocation", text=text)
    text = "run Python code, from standard input if it is '-'; may be repeated"
    _add_step(parser, "command", "-c", "--command", metavar="COMMAND", text=text)
    flag("-n", action="store_true", help="do not make the handle 'h'")
    text = "stop at option negotiation when connecting"
    _add_step(parser, "opt-mode", "--opt-mode", text=text)
    _add_step(parser, "uri", "-u", "--uri", metavar="URI", text="connect to this NBD URI")
    _add_step(parser, "uri", "--connect", metavar="URI", text=argparse.SUPPRESS)
    flag("-v", "--verbose", action="store_true", help="show libnbd's debugging messages")
    flag("-V", "--version", action="store_true", help="show the versions and exit")
    flag("--short-options", action="store_true", help=argparse.SUPPRESS)
    flag("--long-options", action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_step(
    parser: argparse.ArgumentParser, kind: str, *names: str, metavar: str | None = None, text: str
) -> None:
    """Add an option that is a step.  Steps run in the order of the command line."""
    if metavar is None:
        step = (kind, "")
        parser.add_argument(*names, dest="steps", action="append_const", const=step, help=text)
    else:
        parser.add_argument(
            *names,
            dest="steps",
            action="append",
            type=lambda value: (kind, value),
            metavar=metavar,
            help=text,
        )


def _answer(options: argparse.Namespace) -> tuple[str, ...]:
    if options.version:
        return _versions()
    return _SHORT_OPTIONS if options.short_options else _LONG_OPTIONS


def _versions() -> tuple[str, ...]:
    import platform
    from importlib.metadata import version

    from nbd._binding.build import BUNDLED, MODE
    from nbd._binding.shim import as_text, lib

    gnutls = (
        as_text(lib.nbdshim_gnutls()) if lib.nbdshim_gnutls() else "missing, so TLS cannot be used"
    )
    origin = ", from this package" if BUNDLED else ""
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"nbdsh {nbd.__version__}",
        f"libnbd {nbd.__version__}{origin}",
        f"libnbd-cffi {version('libnbd-cffi')} ({interpreter}, cffi {MODE} mode)",
        f"GnuTLS {gnutls}{origin}",
    )


def _named_handle() -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_handle_name("nbdsh")
    return handle


def _scope(handle: nbd.NBD | None) -> dict[str, object]:
    """Make the namespace of all commands, with the names that libnbd's nbdsh documents."""
    # A class that a command defines finds its module in sys.modules by the name of the scope.
    import nbdsh

    scope: dict[str, object] = {"__name__": nbdsh.__name__, "nbd": nbd, "os": os, "sys": sys}
    if handle is not None:
        scope["h"] = handle
    return scope


def _import_from_here(is_interactive: bool) -> None:
    """Let commands import from the current folder, as `python -c` and libnbd's nbdsh do.

    If the folder has a file with the name of a standard module, the modules that the shell, the
    package and tracebacks will need later are imported first, so that they do not come from there.
    """
    if "" in sys.path or sys.flags.isolated or getattr(sys.flags, "safe_path", False):
        return
    if _hides_a_module(os.curdir):
        import importlib

        for name in _LATER + (_LATER_IN_A_SESSION if is_interactive else ()):
            with suppress(ImportError):
                importlib.import_module(name)
        from nbd.shell import tracebacks

        tracebacks.rehearse()
    sys.path.insert(0, "")


def _hides_a_module(folder: str) -> bool:
    """Whether a folder has a module or package with the name of a standard module."""
    try:
        names = {name.partition(".")[0] for name in os.listdir(folder)}
    except OSError:
        return False
    standard: frozenset[str] | None = getattr(sys, "stdlib_module_names", None)
    return bool(names if standard is None else names & standard)


def _run(steps: list[tuple[str, str]], handle: nbd.NBD | None, scope: dict[str, object]) -> None:
    try:
        for kind, text in steps:
            if kind == "command":
                _execute(text, scope)
            elif handle is not None:
                _prepare(handle, kind, text)
    except nbd.Error as error:
        if not _debugging():
            _fail(f"nbdsh: command line script failed: {error.string}")
        from nbd.shell import tracebacks

        tracebacks.show(error, _sources)
        sys.exit(1)
    except (Exception, KeyboardInterrupt):
        from nbd.shell import tracebacks

        tracebacks.install(_sources)
        raise


def _prepare(handle: nbd.NBD, kind: str, text: str) -> None:
    if kind == "uri":
        handle.connect_uri(text)
    elif kind == "opt-mode":
        handle.set_opt_mode(True)
    else:
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def _execute(text: str, scope: dict[str, object]) -> None:
    name = f"<command {len(_sources) + 1}>"
    if text == "-":
        name, text = "<stdin>", sys.stdin.read()
    _sources.setdefault(name, text)
    exec(compile(text, name, "exec", dont_inherit=True), scope)


def _debugging() -> bool:
    # A new handle has the flag of the environment; `h` may be closed, or have another flag.
    return nbd.NBD().get_debug()


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(1)
