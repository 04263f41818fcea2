// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * How an event loop watches a queue: by one descriptor for all of its connections.
 *
 * The descriptor is an epoll.  It is ready when nbdqueue_step has something to do: when a socket is
 * ready for what libnbd waits for, or when another thread has moved a command of the queue to its
 * end.  So the loop never has to ask which way libnbd waits, and the descriptor that it knows is
 * not closed before the queue is.
 *
 * The epoll has the duplicates of the sockets that the handles own (see nbdshim_socket_of).  A
 * forked child shares the epoll with its parent, so it leaves it alone.
 */
#ifndef NBDSHIM_WATCH_H
#define NBDSHIM_WATCH_H

#include "queue_internal.h"

/* Make the descriptor, which the queue owns.  Returns it, or -1 with errno.  q->turn is taken. */
int watch_begin(struct nbdqueue *q);

/* Watch the socket of one handle more, if there is a descriptor.  Returns 0, or -1 with errno. */
int watch_add(const struct nbdqueue *q, struct member *m);

/*
 * Wait for what libnbd waits for, from now on.  The caller has the turn, and has entered the
 * handles.  A handle that another thread moves is left to it for a while.
 */
void watch_update(struct nbdqueue *q);

/* A step begins: what the timer has said is outdated. */
void watch_stop_timer(struct nbdqueue *q);

/* Watch a handle no more.  Called before its socket is closed, if that can be. */
void watch_remove(const struct nbdqueue *q, struct member *m);

/* Close what watch_begin has opened, if it has. */
void watch_end(struct nbdqueue *q);

#endif
