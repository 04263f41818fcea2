// SPDX-License-Identifier: LGPL-2.0-or-later
/* How requests become pieces, and pieces become commands; queue_internal.h shows their way. */
#ifndef NBDSHIM_PIECES_H
#define NBDSHIM_PIECES_H

#include "queue_internal.h"

/*
 * Check a new request against the endpoints, and set its range: a trim shrinks to whole blocks.
 * Returns 0, or the errno with which the request is done at once.
 */
int pieces_check(const struct nbdqueue *q, struct request *r);

/*
 * Reduce q->piece to what both endpoints allow.  q->lock is locked, and no command is in flight:
 * the bounce buffers have the size of a piece.
 */
void pieces_choose_size(struct nbdqueue *q);

/* Send as many commands as the depth allows.  The caller has the turn. */
void pieces_pump(struct nbdqueue *q);

/*
 * Continue with the slots whose commands have ended.  The caller has the turn.  Returns whether
 * there were any.
 */
bool pieces_reap(struct nbdqueue *q);

/* Record that a handle's connection has ended, with an errno or 0, and send no commands there. */
void pieces_mark_lost(struct nbdqueue *q, struct member *m, int error);

/* Mark the slots of a request that was cancelled.  q->lock is locked. */
void pieces_cancel(struct nbdqueue *q, uintptr_t token);

/*
 * Free all requests of a dropped queue, and make its commands in flight orphans.  The caller has
 * the turn.  If nothing is in flight, the queue's token is released when this thread leaves handle
 * s.
 */
void pieces_forget(struct nbdqueue *q, struct nbdshim *s);

/* Drop a reference to a queue, the caller's or that of a command in flight; the last frees it. */
void pieces_unref(struct nbdqueue *q);

#endif
