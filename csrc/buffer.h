// SPDX-License-Identifier: LGPL-2.0-or-later
/* Stale buffers: one thread claims such a buffer, overwrites it, and makes it clean. */
#ifndef NBDSHIM_BUFFER_H
#define NBDSHIM_BUFFER_H

#include "nbdshim.h"

/*
 * Claim a buffer that is stale, to overwrite it.  Returns whether it was: then it is busy until
 * nbdshim_set_clean.
 */
static inline bool nbdshim_claim_stale(int *state)
{
    int stale = NBDSHIM_STALE;

    return __atomic_compare_exchange_n(state, &stale, NBDSHIM_BUSY, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}

static inline void nbdshim_set_clean(int *state)
{
    __atomic_store_n(state, NBDSHIM_CLEAN, __ATOMIC_RELEASE);
}

#endif
