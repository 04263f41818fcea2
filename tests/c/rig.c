// SPDX-License-Identifier: LGPL-2.0-or-later
/* A queue for a test; see rig.h. */

#include "rig.h"

#include "check.h"

#include <unistd.h>

char image[DISK_SIZE];

void add(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s)
{
    CHECK(nbdqueue_add(q, side, s) == 0);
}

void set_up(struct rig *rig, unsigned depth, uint32_t piece)
{
    *rig = (struct rig){.s = nbdshim_create()};
    rig->server = connect_to_silence(rig->s, DISK_SIZE);
    CHECK(nbdcall_set_strict_mode(rig->s, 0) == 0);
    rig->q = nbdqueue_create(depth, piece, give(&rig->token));
    add(rig->q, NBDQUEUE_TARGET, rig->s);
}

void set_up_with(struct rig *rig, struct nbdshim *s, unsigned depth, uint32_t piece)
{
    *rig = (struct rig){.s = s, .server = -1};
    rig->q = nbdqueue_create(depth, piece, give(&rig->token));
    add(rig->q, NBDQUEUE_TARGET, s);
}

void tear_down(struct rig *rig)
{
    nbdqueue_destroy(rig->q);
    nbdshim_destroy(rig->s);
    if (rig->server >= 0)
        close(rig->server);
    CHECK(rig->token.releases == 1);
}

void submit(struct rig *rig, enum nbdqueue_operation operation, uintptr_t token, uint64_t length,
            uint64_t offset)
{
    CHECK(nbdqueue_submit(rig->q, operation, token, image + offset % sizeof image, length, offset,
                          0) == 0);
}

void finish(struct rig *rig, int count)
{
    CHECK(nbdqueue_wait(rig->q, rig->done, MAX_DONE, count, NO_TIMEOUT) == count);
    nbdqueue_take(rig->q, rig->done, count);
}

bool each_ended_once(const struct rig *rig, int count)
{
    unsigned seen = 0;

    for (int i = 0; i < count; i++) {
        unsigned bit = 1U << rig->done[i].token;

        if (rig->done[i].error != 0 || (seen & bit))
            return false;
        seen |= bit;
    }
    return seen == (1U << (count + 1)) - 2;
}
