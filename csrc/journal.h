// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * The changes of the target that its server has acknowledged since the last flush.  A server that
 * was killed may have lost them: pieces.c makes them again when a connection was lost.
 *
 * A change is one piece, with a copy of its data if it is a write; a copy reads the source again.
 * The changes are in the order of their replies.  All functions need q->lock, except
 * journal_prepare and journal_free.
 */
#ifndef NBDSHIM_JOURNAL_H
#define NBDSHIM_JOURNAL_H

#include "queue_internal.h"

/* Whether the queue keeps a journal: the target's connections are replaced, and it can flush. */
static inline bool journal_is_on(const struct nbdqueue *q)
{
    return q->journal.bound != 0 && q->endpoints[NBDQUEUE_TARGET].can_flush;
}

/*
 * Make a change of the piece that a slot has finished, with a copy of its data.  The caller owns
 * it until journal_append.  Returns NULL if the piece is not to be remembered, or if there is no
 * memory: then slot->error is ENOMEM.
 */
struct change *journal_prepare(struct slot *slot);

/* Append a change, which the journal owns from now on. */
void journal_append(struct nbdqueue *q, struct change *change);

/* Whether a flush has to be sent before the next change. */
bool journal_is_full(const struct nbdqueue *q);

/* Forget the changes up to a serial number, because a flush has put them on stable storage. */
void journal_clear(struct nbdqueue *q, uint64_t serial);

/*
 * Have all changes made again, before any other command is sent to the target: a connection was
 * lost or has joined.  A loss also makes the journal smaller; and one during a replay has the next
 * replay flush in between.  So connections that do not live long are not spent on making the same
 * changes over and over.
 */
void journal_interrupt(struct nbdqueue *q, bool is_loss);

/* Free all changes.  No slot uses them any more. */
void journal_free(struct nbdqueue *q);

#endif
