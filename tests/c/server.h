// SPDX-License-Identifier: LGPL-2.0-or-later
/* Handles that are connected to something. */
#ifndef SERVER_H
#define SERVER_H

#include "nbdglue.h"

#include <sys/types.h>

#define DISK_SIZE (1 << 20)

/* A handle to nbdkit's memory plugin, DISK_SIZE bytes, with base:allocation. */
struct nbdshim *connected(void);

/* The same in opt mode: the handshake has reached the options. */
struct nbdshim *negotiating(void);

/* Connect s to nbdkit in a process of our own; returns its process, for kill_server. */
pid_t connect_to_child(struct nbdshim *s);
void kill_server(pid_t server);

/*
 * Connect s to a socket on which the oldstyle handshake offers an export of so many bytes, and
 * nothing more ever comes; returns the server's end, which the caller closes, or -1.
 */
int connect_to_silence(struct nbdshim *s, uint64_t size);

/* A command as a server receives it. */
struct command {
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t size;
};

/* What stands at the server's end of connect_to_silence: take the next command, and answer one. */
struct command receive_command(int server);
void answer(int server, struct command command, uint32_t error, const void *data, size_t size);

/* Start a read of `count` bytes that calls the token back if is_called, and only frees it if not.
 */
int64_t start_read(struct nbdshim *s, void *buf, size_t count, uint64_t offset, uintptr_t token,
                   bool is_called);

/* Drive s until no command is in flight, or no more can be driven. */
void drain(struct nbdshim *s);

#endif
