# SPDX-License-Identifier: LGPL-2.0-or-later
"""The binding: what `import nbd` loads, in the order in which a call needs it.

ARCHITECTURE.md follows a call through these modules.  Each imports only from those above it:

    build         the cffi mode and the libnbd that the package was built with (generated)
    shim          loads the shim: ffi and lib
    errors        nbd.Error, nbd.ClosedHandle, and the exception for a call that failed
    convert       numbers, strings, lists and addresses, from Python to C and back
    pypy          memory and garbage collection of PyPy; CPython does not load it
    memory        results, blocks and their pool, pins and bounce buffers
    buffer        nbd.Buffer, and what libnbd is given of a buffer argument
    callbacks     the registry of what libnbd still needs
    finalize      frees the shim's objects once Python holds no reference to them
    handle        how a handle is made and closed
    upcalls       the functions that the shim calls, one for each type of callback (generated)
    methods       nbd.NBD: one method for each call of libnbd.h (generated)
    constants     the constants of libnbd.h (generated)
"""
