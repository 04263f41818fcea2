# SPDX-License-Identifier: LGPL-2.0-or-later
"""Disks as files, copies and queues: modules that are loaded when they are first used.

Each imports from nbd._binding, and here only from those above it:

    queue         the shim's queue, and nbd.queue.Queue
    connect       nbd.connect
    handles       connections that the caller provides: a callable, or a list of handles
    background    threads, and further connections that are made while the first one works
    extents       nbd.extents
    reconnect     how lost connections are made again
    connections   the connections of a file, and the waits on them
    buffering     read-ahead and write-behind of a file
    rawfile       a disk as an unbuffered file
    file          nbd.open: io's buffers over it, and closing at exit
    endpoints     the two sides of a copy: the interface of their endpoints
    replacing     lost connections of a copy's disk
    copystream    copies in order: those from or to a stream
    diskendpoint  the endpoint that is a disk
    streamendpoint  the endpoint that is a stream
    fileendpoint  the endpoint that is a file
    nullendpoint  the endpoint that discards what is written to it
    copy          nbd.copy
"""
