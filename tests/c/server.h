// SPDX-License-Identifier: LGPL-2.0-or-later
/* Connected handles, and the servers behind them. */
#ifndef SERVER_H
#define SERVER_H

#include "nbdglue.h"

#include <sys/types.h>

#define DISK_SIZE (1 << 20)

/* A handle connected to nbdkit's memory plugin: DISK_SIZE bytes, with base:allocation. */
struct nbdshim *connected(void);

/* A handle connected to a server of the same size that accepts only whole blocks of 4096 bytes. */
struct nbdshim *connected_to_blocks(void);

/* A handle connected in the same way that is negotiating options. */
struct nbdshim *negotiating(void);

/* Connect s to nbdkit in a child of this process; returns its process id, for kill_server. */
pid_t connect_to_child(struct nbdshim *s);
void kill_server(pid_t server);

/*
 * Connect s to a socket pair.  The server's side sends the oldstyle handshake for an export of
 * `size` bytes, and nothing else.  Returns the server's socket, which the caller closes.
 */
int connect_to_silence(struct nbdshim *s, uint64_t size);

/* The same, with the low byte of the transmission flags, of which the lowest bit has to be set. */
int connect_with_flags(struct nbdshim *s, uint64_t size, uint8_t transmission);

/* A command as the server receives it. */
struct command {
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t size;
};

/* Receive the next command from a socket of connect_to_silence, and reply to a command. */
struct command receive_command(int server);
void answer(int server, struct command command, uint32_t error, const void *data, size_t size);

/* Start a read of `count` bytes.  Its completion is called if is_called; if not, only released. */
int64_t start_read(struct nbdshim *s, void *buf, size_t count, uint64_t offset, uintptr_t token,
                   bool is_called);

/* Poll s until no command is in flight, or nothing happens any more. */
void drain(struct nbdshim *s);

#endif
