// SPDX-License-Identifier: LGPL-2.0-or-later
/* The journal of a queue; see journal.h. */

#include "journal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* What a change costs that has no data. */
#define COST_OF_RANGE 4096
/* Losses do not reduce the journal below this size. */
#define MIN_LIMIT (UINT64_C(4) << 20)

static bool is_changing(enum nbdqueue_operation operation)
{
    return operation == NBDQUEUE_WRITE || operation == NBDQUEUE_ZERO ||
           operation == NBDQUEUE_TRIM || operation == NBDQUEUE_COPY;
}

/* Whether a piece has to be remembered. */
static bool is_worth_keeping(const struct slot *slot)
{
    const struct nbdqueue *q = slot->q;
    const struct request *r = slot->request;

    if (!journal_is_on(q) || r->origin != OF_CALLER || slot->error != 0 ||
        !is_changing(r->operation) || slot->member == NULL)
        return false;
    /* A change with FUA is stable; but making an older one again could undo it. */
    return (r->flags & LIBNBD_CMD_FLAG_FUA) == 0 || q->journal.first != NULL;
}

struct change *journal_prepare(struct slot *slot)
{
    const struct request *r = slot->request;
    bool has_data = r->operation == NBDQUEUE_WRITE;
    struct change *change;

    if (!is_worth_keeping(slot))
        return NULL;
    change = malloc(sizeof *change + (has_data ? slot->length : 0));
    if (change == NULL) {
        slot->error = ENOMEM;
        return NULL;
    }
    *change = (struct change){.request = {.operation = r->operation,
                                          .start = slot->offset,
                                          .cut = slot->offset,
                                          .stop = slot->offset + slot->length,
                                          .flags = r->flags,
                                          .origin = OF_REPLAY}};
    change->cost = has_data || r->operation == NBDQUEUE_COPY ? slot->length : COST_OF_RANGE;
    if (has_data) {
        change->request.buffer = change->data;
        memcpy(change->data, r->buffer + (slot->offset - r->start), slot->length);
    }
    return change;
}

void journal_append(struct nbdqueue *q, struct change *change)
{
    struct journal *j = &q->journal;

    change->serial = ++j->serial;
    *j->last = change;
    j->last = &change->next;
    j->size += change->cost;
}

bool journal_is_full(const struct nbdqueue *q)
{
    return journal_is_on(q) && q->journal.size >= q->journal.limit;
}

void journal_clear(struct nbdqueue *q, uint64_t serial)
{
    struct journal *j = &q->journal;

    while (j->first != NULL && j->first->serial <= serial) {
        struct change *change = j->first;

        j->first = change->next;
        if (j->first == NULL)
            j->last = &j->first;
        j->size -= change->cost;
        free(change);
    }
    j->limit = j->limit < j->bound / 2 ? 2 * j->limit : j->bound;
}

void journal_interrupt(struct nbdqueue *q, bool is_loss)
{
    struct journal *j = &q->journal;

    if (!journal_is_on(q))
        return;
    if (is_loss && j->is_replaying && j->size > 0)
        j->part = (j->part < j->size ? j->part : j->size) / 4;
    j->is_due = true;
    j->is_replaying = false;
    if (is_loss && j->limit / 4 >= MIN_LIMIT)
        j->limit /= 4;
}

void journal_free(struct nbdqueue *q)
{
    journal_clear(q, UINT64_MAX);
}
