# SPDX-License-Identifier: LGPL-2.0-or-later
"""The binding: what `import nbd` loads, in the order in which a call needs it.

ARCHITECTURE.md describes the way of a call.  Each module imports only from those above it:

    build         the cffi mode and the libnbd that the package was built with (generated)
    shim          loads the shim: ffi and lib
    errors        nbd.Error, nbd.ClosedHandle, and the exception for a call that failed
    convert       numbers, strings, lists and addresses, from Python to C and back
    memory        results, blocks and their pool, pins and bounce buffers
    buffer        nbd.Buffer, and what libnbd is given of a buffer argument
    callbacks     the registry of what libnbd still needs
    lifetime      what the shim has made is freed when Python cannot name it any more
    handle        how a handle begins and ends
    upcalls       the functions that the shim calls, one for each type of callback (generated)
    methods       nbd.NBD: one method for each call of libnbd.h (generated)
    constants     the constants of libnbd.h (generated)
"""
