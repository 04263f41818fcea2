#!/bin/bash
# SPDX-License-Identifier: LGPL-2.0-or-later
# Build CPython for musl, which Debian lacks, with zig into /opt/python-ARCHITECTURE.
# Usage, in a Debian root: muslpython.sh ARCHITECTURE DEBIAN-ARCHITECTURE
set -euo pipefail
architecture=$1 debian=$2
bin=/opt/bin-$architecture

sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >/etc/apt/sources.list.d/sources.list
dpkg --add-architecture "$debian"
apt-get update
apt-get install -y --no-install-recommends "musl:$debian" # the libc, which is the loader
cd /opt
[[ -d zig ]] || python3 -m pip install --no-input --target zig ziglang
[[ -d source ]] || apt-get source python3.13
[[ -d source ]] || mv python3.13-*/ source

# zig links statically with musl, and a static program cannot load extension modules.
mkdir -p "$bin"
for tool in "cc -target $architecture-linux-musl -dynamic -Wno-date-time" ar ranlib; do
    printf '#!/bin/sh\nexec /opt/zig/ziglang/zig %s "$@"\n' "$tool" >"$bin/${tool%% *}"
done
chmod +x "$bin"/*
rm -rf "build-$architecture"
mkdir "build-$architecture"
cd "build-$architecture"
export CC=$bin/cc AR=$bin/ar RANLIB=$bin/ranlib CFLAGS="-O1 -g0"
# configure knows musl by this name, which zig's stdarg.h lacks; without it, no extension module would
# be found, because their names contain the libc.
export CPP="$CC -E -D__DEFINED_va_list"
../source/configure --build="$(uname -m)-build-linux-gnu" --host="$architecture-linux-musl" \
    --prefix="/opt/python-$architecture" --with-build-python=python3 --without-ensurepip \
    --disable-test-modules ac_cv_file__dev_ptmx=yes ac_cv_file__dev_ptc=no \
    ac_cv_buggy_getaddrinfo=no
make
make DESTDIR=/opt/unfinished install
mv "/opt/unfinished/opt/python-$architecture" /opt
rm -rf "/opt/build-$architecture"
