"""A made-up version of libnbd is bound by the rules alone: built, loaded and called."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkout import CHECKOUT

HEADER = """\
#ifndef LIBNBD_H
#define LIBNBD_H
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/types.h>
#include <sys/socket.h>

#define LIBNBD_WEATHER_SUNNY 0x2aU
#define LIBNBD_WEATHER_WINDY (LIBNBD_WEATHER_SUNNY | 1U << 8)
#define LIBNBD_PLACE_BRNO "brno"
#define LIBNBD_ODD (sizeof (int))

#define LIBNBD_AIO_DIRECTION_READ 1U
#define LIBNBD_AIO_DIRECTION_WRITE 2U
#define LIBNBD_CMD_FLAG_FUA 1U
#define LIBNBD_SIZE_MINIMUM 0
#define LIBNBD_SIZE_MAXIMUM 2

struct nbd_handle;
typedef struct { uint64_t speed; uint64_t direction; } nbd_wind;
typedef struct {
  int (*callback) (void *user_data, const char *place, int64_t degrees, uint16_t *hours,
                   size_t nr_hours, nbd_wind *winds, size_t nr_winds, const void *report,
                   size_t size, int *error);
  void *user_data;
  void (*free) (void *user_data);
} nbd_weather_callback;
typedef struct {
  int (*callback) (void *user_data, const char *place, int64_t degrees);
  void *user_data;
  void (*free) (void *user_data);
} nbd_storm_callback;
typedef struct {
  int (*callback) (void *user_data, int *error);
  void *user_data;
  void (*free) (void *user_data);
} nbd_completion_callback;
#define NBD_NULL_COMPLETION ((nbd_completion_callback) { .callback = NULL })

extern struct nbd_handle *nbd_create (void) __attribute__ ((__nonnull__));
extern void nbd_close (struct nbd_handle *h);
extern const char *nbd_get_error (void);
extern int nbd_get_errno (void);
extern const char *nbd_get_package_name (struct nbd_handle *h);
extern const char *nbd_get_version (struct nbd_handle *h);
extern int nbd_aio_get_fd (struct nbd_handle *h);
extern int nbd_aio_is_dead (struct nbd_handle *h);
extern int nbd_aio_is_closed (struct nbd_handle *h);
extern int nbd_aio_is_connecting (struct nbd_handle *h);
extern int nbd_aio_is_negotiating (struct nbd_handle *h);
extern int nbd_aio_is_processing (struct nbd_handle *h);
extern int nbd_aio_is_ready (struct nbd_handle *h);
extern unsigned nbd_aio_get_direction (struct nbd_handle *h);
extern int nbd_aio_notify_read (struct nbd_handle *h);
extern int nbd_aio_notify_write (struct nbd_handle *h);
extern int nbd_aio_command_completed (struct nbd_handle *h, uint64_t cookie);
extern int nbd_aio_disconnect (struct nbd_handle *h, uint32_t flags);
extern int nbd_aio_opt_abort (struct nbd_handle *h);
extern int nbd_poll (struct nbd_handle *h, int timeout);
extern int nbd_shutdown (struct nbd_handle *h, uint32_t flags);
extern int64_t nbd_get_size (struct nbd_handle *h);
extern int nbd_can_flush (struct nbd_handle *h);
extern int nbd_can_zero (struct nbd_handle *h);
extern int64_t nbd_aio_pread (struct nbd_handle *h, void *buf, size_t count, uint64_t offset,
                              nbd_completion_callback completion_callback, uint32_t flags);
extern int64_t nbd_aio_pwrite (struct nbd_handle *h, const void *buf, size_t count,
                               uint64_t offset, nbd_completion_callback completion_callback,
                               uint32_t flags);
extern int64_t nbd_aio_zero (struct nbd_handle *h, uint64_t count, uint64_t offset,
                             nbd_completion_callback completion_callback, uint32_t flags);
extern int64_t nbd_aio_trim (struct nbd_handle *h, uint64_t count, uint64_t offset,
                             nbd_completion_callback completion_callback, uint32_t flags);
extern int64_t nbd_aio_cache (struct nbd_handle *h, uint64_t count, uint64_t offset,
                              nbd_completion_callback completion_callback, uint32_t flags);
extern int64_t nbd_aio_flush (struct nbd_handle *h, nbd_completion_callback completion_callback,
                              uint32_t flags);

extern int nbd_set_umbrella (struct nbd_handle *h, bool open);
extern int nbd_get_umbrella (struct nbd_handle *h);
extern char *nbd_describe (struct nbd_handle *h, char **places);
extern int nbd_forecast (struct nbd_handle *h, void *report, size_t count, const char *pin,
                         nbd_weather_callback weather_callback, uint32_t flags);
extern int64_t nbd_aio_forecast (struct nbd_handle *h, int64_t degrees,
                                 nbd_storm_callback storm_callback,
                                 nbd_completion_callback completion_callback);
extern int nbd_odd (struct nbd_handle *h, double degrees);
#endif
"""

LIBRARY = r"""
#define _GNU_SOURCE
#include "libnbd.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct nbd_handle { bool umbrella; };
static const char *message;
static int number;

static int fail (const char *text, int error)
{
  message = text;
  number = error;
  return -1;
}

struct nbd_handle *nbd_create (void) { return calloc (1, sizeof (struct nbd_handle)); }
void nbd_close (struct nbd_handle *h) { free (h); }
const char *nbd_get_error (void) { return message; }
int nbd_get_errno (void) { return number; }
const char *nbd_get_package_name (struct nbd_handle *h) { (void) h; return "made-up"; }
const char *nbd_get_version (struct nbd_handle *h) { (void) h; return "1.99.1"; }
int nbd_aio_get_fd (struct nbd_handle *h) { (void) h; return -1; }
int nbd_aio_is_dead (struct nbd_handle *h) { (void) h; return 0; }
int nbd_aio_is_closed (struct nbd_handle *h) { (void) h; return 0; }
int nbd_aio_is_connecting (struct nbd_handle *h) { (void) h; return 0; }
int nbd_aio_is_negotiating (struct nbd_handle *h) { (void) h; return 0; }
int nbd_aio_is_processing (struct nbd_handle *h) { (void) h; return 0; }
int nbd_aio_is_ready (struct nbd_handle *h) { (void) h; return 0; }
unsigned nbd_aio_get_direction (struct nbd_handle *h) { (void) h; return 0; }
int nbd_aio_notify_read (struct nbd_handle *h) { (void) h; return -1; }
int nbd_aio_notify_write (struct nbd_handle *h) { (void) h; return -1; }
int nbd_aio_command_completed (struct nbd_handle *h, uint64_t c) { (void) h; return c ? 0 : -1; }
int nbd_aio_disconnect (struct nbd_handle *h, uint32_t flags) { (void) h; return -!!flags; }
int nbd_aio_opt_abort (struct nbd_handle *h) { (void) h; return -1; }
int nbd_poll (struct nbd_handle *h, int timeout) { (void) h; return -!!timeout; }
int nbd_shutdown (struct nbd_handle *h, uint32_t flags) { (void) h; return -!!flags; }
int64_t nbd_get_size (struct nbd_handle *h) { (void) h; return -1; }
int nbd_can_flush (struct nbd_handle *h) { (void) h; return -1; }
int nbd_can_zero (struct nbd_handle *h) { (void) h; return -1; }

static int64_t refuse (nbd_completion_callback done)
{
  if (done.free)
    done.free (done.user_data);
  return fail ("not connected", ENOTCONN);
}

int64_t nbd_aio_pread (struct nbd_handle *h, void *buf, size_t count, uint64_t offset,
                       nbd_completion_callback done, uint32_t flags)
{
  (void) h, (void) buf, (void) count, (void) offset, (void) flags;
  return refuse (done);
}

int64_t nbd_aio_pwrite (struct nbd_handle *h, const void *buf, size_t count, uint64_t offset,
                        nbd_completion_callback done, uint32_t flags)
{
  (void) h, (void) buf, (void) count, (void) offset, (void) flags;
  return refuse (done);
}

#define NO_DATA(name)                                                                    \
  int64_t name (struct nbd_handle *h, uint64_t count, uint64_t offset,                   \
                nbd_completion_callback done, uint32_t flags)                            \
  {                                                                                      \
    (void) h, (void) count, (void) offset, (void) flags;                                 \
    return refuse (done);                                                                \
  }
NO_DATA (nbd_aio_zero)
NO_DATA (nbd_aio_trim)
NO_DATA (nbd_aio_cache)

int64_t nbd_aio_flush (struct nbd_handle *h, nbd_completion_callback done, uint32_t flags)
{
  (void) h, (void) flags;
  return refuse (done);
}

int nbd_set_umbrella (struct nbd_handle *h, bool open) { h->umbrella = open; return 0; }
int nbd_get_umbrella (struct nbd_handle *h) { return h->umbrella; }

char *nbd_describe (struct nbd_handle *h, char **places)
{
  char *text = strdup ("");
  for (; *places; places++) {
    char *longer;
    if (asprintf (&longer, "%s[%s]", text, *places) == -1)
      abort ();
    free (text);
    text = longer;
  }
  (void) h;
  return text;
}

int nbd_forecast (struct nbd_handle *h, void *report, size_t count, const char *pin,
                  nbd_weather_callback weather, uint32_t flags)
{
  uint16_t hours[] = { 6, 12, 65535 };
  nbd_wind winds[] = { { UINT64_MAX, 90 }, { 3, 270 } };
  int error = 0, ret = 0;
  (void) h;
  memset (report, 'w', count);
  if (strcmp (pin, "nowhere") == 0)
    ret = fail ("nbd_forecast: no such place", ENOENT);
  else if (weather.callback (weather.user_data, pin, -(int64_t) flags, hours, 3, winds, 2,
                             (char *) report + 1, 2, &error) == -1)
    ret = fail ("nbd_forecast: the callback failed", error);
  weather.free (weather.user_data);
  return ret;
}

int64_t nbd_aio_forecast (struct nbd_handle *h, int64_t degrees, nbd_storm_callback storm,
                          nbd_completion_callback completion)
{
  int error = 5;
  (void) h;
  storm.callback (storm.user_data, "later", degrees);
  if (completion.callback)
    completion.callback (completion.user_data, &error);
  if (completion.free)
    completion.free (completion.user_data);
  storm.free (storm.user_data);
  return 7;
}
"""

PKG_CONFIG = """\
includedir={folder}
Name: libnbd
Description: made up
Version: 1.99.1
Cflags: -I{folder}
Libs: -L{folder} -lnbd -Wl,-rpath,{folder}
"""

#: Examples; tests compare the content of `out` after each.
PROGRAM = """\
import inspect, json, sys
import nbd
from nbd._binding import callbacks
out = {}
h = nbd.NBD()
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    """Return the C compiler."""
    found = shutil.which("cc")
    if found is None or shutil.which("pkg-config") is None:
        pytest.skip("cc or pkg-config is not installed (Debian packages: gcc, pkg-config)")
    return found


@pytest.fixture(scope="module")
def made_up(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Build the package for the made-up libnbd; return its folder and the build's output."""
    folder = tmp_path_factory.mktemp("made-up")
    (folder / "libnbd.h").write_text(HEADER)
    (folder / "libnbd.c").write_text(LIBRARY)
    (folder / "libnbd.pc").write_text(PKG_CONFIG.format(folder=folder))
    shared = [compiler, "-shared", "-fPIC", "-O1", f"-I{folder}"]
    run(*shared, folder / "libnbd.c", "-o", folder / "libnbd.so")

    package = folder / "nbd"
    binding = package / "_binding"
    shutil.copytree(CHECKOUT / "nbd", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    generated = folder / "generated"
    said = run(
        *(sys.executable, CHECKOUT / "build_nbd.py", generated),
        PKG_CONFIG_LIBDIR=str(folder),
        PKG_CONFIG_PATH="",
        NBD_CFFI_MODE="abi",
    ).stderr
    for module in generated.glob("*.py"):
        shutil.copy(module, binding)
    run(
        *(*shared, "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"),
        *(f"-I{CHECKOUT / 'csrc'}", f"-I{generated}"),
        *(CHECKOUT / "csrc").glob("*.c"),
        generated / "nbdglue.c",
        *(f"-L{folder}", "-lnbd", f"-Wl,-rpath,{folder}", "-o", binding / "nbdshim.so"),
    )
    return folder, said


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def does(made_up: tuple[Path, str]) -> Callable[[str], dict[str, Any]]:
    """Return a function that runs lines of Python with the made-up nbd, and returns `out`."""

    def do(lines: str) -> dict[str, Any]:
        program = f"{PROGRAM}{lines}\nprint(json.dumps(out))"
        done = run(sys.executable, "-c", program, PYTHONPATH=str(made_up[0]))
        assert not done.stderr
        out: dict[str, Any] = json.loads(done.stdout)
        return out

    return do


Does = Callable[[str], "dict[str, Any]"]


def test_the_unknown_libnbd_is_the_one_that_is_loaded(does: Does) -> None:
    assert does("out.update(name=nbd.package_name, version=nbd.__version__)") == {
        "name": "made-up",
        "version": "1.99.1",
    }


def test_names_that_the_header_lacks_are_absent(does: Does) -> None:
    names = ("pread", "connect_uri", "aio_block_status", "odd", "TLS_REQUIRE", "ODD")
    lines = f"out.update((n, hasattr(nbd.NBD, n) or hasattr(nbd, n)) for n in {names})"
    assert does(lines) == dict.fromkeys(names, False)


def test_a_function_that_no_rule_covers_is_reported_and_not_bound(
    made_up: tuple[Path, str],
) -> None:
    assert "warning: nbd_odd is not bound: no rule for the parameter double degrees" in made_up[1]
    assert "warning: LIBNBD_ODD is not bound: no rule for the value sizeof(int)" in made_up[1]


def test_an_unknown_constant_has_its_value(does: Does) -> None:
    names = ("WEATHER_SUNNY", "WEATHER_WINDY", "PLACE_BRNO")
    found = does(f"out.update((n, getattr(nbd, n)) for n in {names})")
    assert found == {"WEATHER_SUNNY": 42, "WEATHER_WINDY": 42 | 256, "PLACE_BRNO": "brno"}


def test_an_unknown_switch_is_a_bool(does: Does) -> None:
    lines = "out['before'] = h.get_umbrella(); out['set'] = h.set_umbrella([1])\n"
    assert does(f"{lines}out['after'] = h.get_umbrella()") == {
        "before": False,
        "set": None,
        "after": True,
    }


def test_an_unknown_call_takes_a_list_and_returns_text(does: Does) -> None:
    lines = "out['text'] = h.describe(['Brno', 'Z\\u00fcrich', '\\udcff'])"
    assert does(lines)["text"] == "[Brno][Z\u00fcrich][\udcff]"


def test_signatures_follow_the_rules(does: Does) -> None:
    lines = "for n in ('forecast', 'aio_forecast'):\n"
    lines += "    out[n] = str(inspect.signature(getattr(nbd.NBD, n)))"
    signatures = {
        name: inspect.signature(eval(f"lambda {strip_annotations(text)}: None"))
        for name, text in does(lines).items()
    }
    assert {name: str(signature) for name, signature in signatures.items()} == {
        "forecast": "(self, count, pin_, weather, flags=0)",
        "aio_forecast": "(self, degrees, storm, completion=None)",
    }


def strip_annotations(signature: str) -> str:
    """Return the parameters of a signature without their types."""
    (function,) = ast.parse(f"def f{signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    for argument in function.args.args:
        argument.annotation = None
    return ast.unparse(function.args)


def test_an_unknown_callback_is_called_with_converted_arguments(does: Does) -> None:
    lines = """
def weather(place, degrees, hours, winds, report, error):
    out["seen"] = [place, degrees, hours, winds]
    out["report"] = [bytes(report).decode(), report.readonly, error.value]
    return 0
out["read"] = h.forecast(4, "brno", weather, 5).decode()
out["left"] = len(callbacks.registry)
"""
    assert does(lines) == {
        "seen": ["brno", -5, [6, 12, 65535], [[2**64 - 1, 90], [3, 270]]],
        "report": ["ww", True, 0],
        "read": "wwww",
        "left": 0,
    }


def test_an_unknown_call_fails_as_the_others_do(does: Does) -> None:
    lines = """
def raises(*arguments):
    arguments[-1].value = 12
    raise RuntimeError("rain")
for place in ("nowhere", "somewhere"):
    try:
        h.forecast(4, place, raises)
    except nbd.Error as error:
        out[place] = [error.string, error.errno, repr(error.__cause__)]
for wrong in ((4, b"bytes", raises), (-1, "x", raises), (4, "x", 7)):
    try:
        h.forecast(*wrong)
    except (TypeError, ValueError, OverflowError) as error:
        out[str(len(out))] = str(error)
out["left"] = len(callbacks.registry)
"""
    assert does(lines) == {
        "nowhere": ["nbd_forecast: no such place", "ENOENT", "None"],
        "somewhere": ["nbd_forecast: the callback failed", "ENOMEM", "RuntimeError('rain')"],
        "2": "pin_: str is needed, not bytes",
        "3": "count: -1 is negative",
        "4": "weather: a callable is needed, not int",
        "left": 0,
    }


def test_an_unknown_call_completes_later(does: Does) -> None:
    lines = """
def storm(place, degrees):
    out.setdefault("told", []).append([place, degrees])
def completion(error):
    out["error"] = error.value
    return 1
out["cookies"] = [h.aio_forecast(-40, storm, completion), h.aio_forecast(2**63 - 1, storm)]
out["left"] = len(callbacks.registry)
"""
    assert does(lines) == {
        "told": [["later", -40], ["later", 2**63 - 1]],
        "error": 5,
        "cookies": [7, 7],
        "left": 0,
    }


def test_an_unknown_call_is_documented_as_such(does: Does) -> None:
    text = does("out['text'] = inspect.getdoc(nbd.NBD.forecast)")["text"]
    assert "nbd_forecast(3)" in text
    assert "only from libnbd.h" in " ".join(text.split())
    assert "forecast" in does("out['text'] = inspect.getdoc(nbd.NBD)")["text"]
