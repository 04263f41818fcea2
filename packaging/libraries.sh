#!/bin/bash
# SPDX-License-Identifier: LGPL-2.0-or-later
# Build libnbd and its dependencies from the sources in SOURCES/NAME for a target, into ./root/usr.
# Usage, in a folder of its own: libraries.sh SOURCES ZIG ZIG-TARGET
#
# Only what libnbd uses is built: GnuTLS without PKCS#11 tokens, and the URI parser of libxml2.
set -euo pipefail
sources=$1 zig=$2 target=$3
here=$PWD
root=$here/root

mkdir -p bin
for tool in cc ar ranlib; do
    options=
    [[ $tool == cc ]] && options="-target $target"
    printf '#!/bin/sh\nexec %s %s %s "$@"\n' "$zig" $tool "$options" >"bin/$tool"
    chmod +x "bin/$tool"
done
export CC=$here/bin/cc AR=$here/bin/ar RANLIB=$here/bin/ranlib CC_FOR_BUILD=gcc
export CFLAGS="-O2 -g0 -fPIC -ffile-prefix-map=$here=." CPPFLAGS="-I$root/usr/include"
# Version scripts name functions that are not built here, which only GNU's linker accepts by default.
# libtool drops a plain -s.
export LDFLAGS="-Wl,-s -Wl,--undefined-version -L$root/usr/lib"
export PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_LIBDIR=$root/usr/lib/pkgconfig

# configure NAME OPTION...: copy a source, enter the copy, and configure it.
configure() {
    cp -a "$sources/$1" "$here/$1"
    cd "$here/$1"
    # Generated files are part of the source.  Debian's patches are newer, but must not rebuild them.
    find . -name aclocal.m4 -exec touch {} +
    find . \( -name configure -o -name '*.in' -o -name '*.info' \) -exec touch {} +
    # --build differs from every --host, so configure cross compiles: it must not find out by running
    # programs, which works on some machines and not on others.
    ./configure --build="$(uname -m)-build-linux-gnu" --host="${target%%.*}" --prefix=/usr \
        --libdir=/usr/lib --sysconfdir=/etc --localstatedir=/var --enable-shared --disable-static \
        --disable-dependency-tracking "${@:2}"
}

# into_root TARGET...: make, and install into our root.  libtool's .la files would refer to /usr.
into_root() {
    make DESTDIR="$root" "$@"
    find "$root" -name '*.la' -delete
}

# Debian removes the manual, which is not free, but the build expects its Makefile.
mkdir -p "$sources/gmp/doc"
printf 'all install:\n' >"$sources/gmp/doc/Makefile.in"
configure gmp
into_root install

configure nettle --disable-documentation --disable-openssl --enable-fat
into_root install

configure libtasn1-6 --disable-doc
into_root -C lib install

configure libxml2 --with-minimum --without-python
make libxml2.la
into_root install-libLTLIBRARIES install-pkgconfigDATA install-data

configure gnutls28 --with-included-unistring --without-idn --without-p11-kit --without-tpm \
    --without-tpm2 --without-zlib --without-brotli --without-zstd --disable-cxx --disable-doc \
    --disable-libdane --disable-nls --disable-tests --disable-tools \
    --with-default-trust-store-file=/etc/ssl/certs/ca-certificates.crt
make -C gl
into_root -C lib install

configure libnbd --disable-fuse --disable-golang --disable-ocaml --disable-python --disable-rust \
    --disable-ublk --with-tls-priority=NORMAL
make -C common/include
make -C common/utils
into_root -C lib install
into_root -C include install
