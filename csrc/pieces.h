// SPDX-License-Identifier: LGPL-2.0-or-later
/* How the pieces of a queue's requests become commands; see queue_internal.h for their way. */
#ifndef NBDSHIM_PIECES_H
#define NBDSHIM_PIECES_H

#include "queue_internal.h"

/*
 * What is known at once of a new request: that it cannot be, or has nothing to do.  Returns 0 or an
 * errno.
 */
int pieces_check(const struct nbdqueue *q, struct request *r);

/* Find the largest piece that both ends allow.  q->lock is locked, and no command is in flight. */
void pieces_choose_size(struct nbdqueue *q);

/* Send as much as the depth allows.  The caller has the turn. */
void pieces_pump(struct nbdqueue *q);

/*
 * Go on with the slots whose commands have ended.  The caller has the turn.  Returns whether there
 * were any.
 */
bool pieces_reap(struct nbdqueue *q);

/* The connection of a handle has ended, with an errno or 0: no more commands go there. */
void pieces_mark_lost(const struct nbdqueue *q, struct member *m, int error);

/* Mark the slots of a request that was cancelled.  q->lock is locked. */
void pieces_cancel(struct nbdqueue *q, uintptr_t token);

/*
 * The end of all requests of a queue that was dropped.  Commands in flight become orphans.  The
 * caller has the turn.  s is the handle whose call hands the queue's token over, if that can be
 * now.
 */
void pieces_forget(struct nbdqueue *q, struct nbdshim *s);

/* Let go of a queue, for the caller or for a command in flight; the last one frees it. */
void pieces_unref(struct nbdqueue *q);

#endif
