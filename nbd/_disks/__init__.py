# SPDX-License-Identifier: LGPL-2.0-or-later
"""Disks as files, copies and queues: modules that are loaded when they are first used.

Each imports from nbd._binding, and here only from those above it:

    queue         the shim's queue, and nbd.queue.Queue
    connect       nbd.connect
    background    threads, and further connections that are made while the first one works
    extents       nbd.extents
    connections   the connections of a file, and the waits on them
    buffering     read-ahead and write-behind of a file
    rawfile       a disk as an unbuffered file
    file          nbd.open: io's buffers over it, and closing at exit
    diskendpoint  the disks that a copy reads from and writes to
    streamendpoint  the streams of a copy, which are read or written in order
    fileendpoint  the files of a copy
    endpoints     what a copy reads from and writes to
    rescue        reading around what cannot be read
    copystream    copies from and to streams
    copy          nbd.copy
"""
