// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * How an event loop watches a queue: through one descriptor for all of its connections.
 *
 * The descriptor is an epoll.  It is ready when nbdqueue_step has something to do: a socket is
 * ready in the direction in which libnbd waits, or another thread has received the reply to a
 * command of the queue.  So the event loop need not follow libnbd's direction, and the descriptor
 * that it watches stays open as long as the queue.
 *
 * The epoll contains the duplicates of the sockets, which the handles own (see nbdshim_socket_of).
 * A forked child shares the epoll with its parent, and so must not change it.
 */
#ifndef NBDSHIM_WATCH_H
#define NBDSHIM_WATCH_H

#include "queue_internal.h"

/* Create and return the queue's descriptor, or -1 with errno.  The caller has the turn. */
int watch_begin(struct nbdqueue *q);

/* Watch the socket of another handle, if there is a descriptor.  Returns 0, or -1 with errno. */
int watch_add(const struct nbdqueue *q, struct member *m);

/*
 * Update the events to those that libnbd waits for.  The caller has the turn, and has entered the
 * handles.  A handle that another thread moves is not watched until the retry interval is over.
 */
void watch_update(struct nbdqueue *q);

/* Stop the timer of the retry interval, at the start of a step. */
void watch_stop_timer(struct nbdqueue *q);

/*
 * Stop watching a handle.  If possible, this is called before the socket is closed: the descriptor
 * has to be valid to be removed from the epoll.
 */
void watch_remove(const struct nbdqueue *q, struct member *m);

/* Close the descriptors that watch_begin has opened, if any. */
void watch_end(struct nbdqueue *q);

#endif
