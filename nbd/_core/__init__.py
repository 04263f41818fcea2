# SPDX-License-Identifier: LGPL-2.0-or-later
"""What is private, in the order in which a call needs it; ARCHITECTURE.md walks the way of a call.

Each module imports only from those above it:

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
    engine        the shim's queue
    queue         nbd.queue.Queue
    connecting    nbd.connect
    threads       threads that can be begun and awaited wherever a signal handler raises
    joining       further connections, made while the first one works
    extents       nbd.extents
    connections   the connections of a file, and the waits on them
    readahead     the window of a file that is read in order
    writes        the writes of a file that are in flight
    diskfile      a disk as an unbuffered file
    filebuffers   the buffers of io over it
    openfiles     the open files, closed when the program ends
    file          nbd.open
    disks         the disks that a copy reads from and writes to
    channels      pipes, sockets and terminals, of which a copy waits in poll
    files         the files and streams of a copy
    ends          what a copy reads from and writes to
    rescue        reading around what cannot be read
    streaming     copies from and to streams
    copying       nbd.copy
    asyncthreads  threads for what an event loop cannot wait for
    client        nbd.aio.Client
    asyncconnect  nbd.aio.connect
    asynccopy     nbd.aio.copy
"""
