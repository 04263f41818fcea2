# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec: a path is the URI of an export, with all its parts."""

from __future__ import annotations

import fsspec
import pytest
from fsspec.core import url_to_fs

from nbd.fsspec import NBDFileSystem
from nbd.fsspec._url import split

URLS = {
    "nbd://server/disk": "nbd://server/",
    "nbd://server": "nbd://server/",
    "nbds://alice@server:10810/a%20disk?tls-psk-file=/keys.psk": (
        "nbds://alice@server:10810/?tls-psk-file=/keys.psk"
    ),
    "nbd+unix:///disk?socket=/run/nbd.sock": "nbd+unix:///?socket=/run/nbd.sock",
    "nbds+unix:///?socket=/run/nbd.sock": "nbds+unix:///?socket=/run/nbd.sock",
    "nbd+vsock://2:10809/disk": "nbd+vsock://2:10809/",
    "nbds+vsock://2/a%2Fb": "nbds+vsock://2/",
    "nbd://[0:0:0:0:0:0:0:1]:10809/disk": "nbd://[0:0:0:0:0:0:0:1]:10809/",
}


@pytest.mark.parametrize("url", URLS)
def test_a_path_is_the_whole_url(url: str) -> None:
    fs, path = url_to_fs(url)
    assert isinstance(fs, NBDFileSystem)
    assert path == url
    assert fs.unstrip_protocol(path) == url
    assert fs._strip_protocol([url]) == [url]


@pytest.mark.parametrize("url", URLS)
def test_the_parent_of_an_export_is_its_server(url: str) -> None:
    parent = NBDFileSystem._parent(url)
    assert parent == URLS[url]
    assert NBDFileSystem._parent(parent) == parent


def test_an_ipv6_address_is_kept() -> None:
    assert NBDFileSystem._parent("nbd://[::1]:10809/disk") == "nbd://[::1]:10809/"


def test_a_short_ipv6_address_is_refused_where_fsspec_takes_it_for_a_chain() -> None:
    with pytest.raises(ValueError, match="without it, such as"):
        fsspec.open("nbd://[::1]/disk")


@pytest.mark.parametrize("name", ["disk", "a b", "a/b", "?", "#*[", "\udcff", "ä", "%2F", ""])
def test_any_export_name_makes_a_url(name: str) -> None:
    url = split("nbd+unix:///?socket=/s").export(name)
    assert split(str(url)) == url
    assert url.export_name == name
    assert url.name.isascii()


@pytest.mark.parametrize("name", [".", "..", "../../etc/passwd", "/etc/passwd", ""])
def test_no_export_name_chooses_the_folder_of_a_local_file(name: str) -> None:
    file_name = split("nbd://server").export(name).file_name
    assert file_name not in ("", ".", "..")
    assert "/" not in file_name


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="'timeot'"):
        fsspec.filesystem("nbd", timeot=1)


def test_a_bad_value_of_an_option_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="connections"):
        fsspec.filesystem("nbd", connections=0)
