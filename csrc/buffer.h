// SPDX-License-Identifier: LGPL-2.0-or-later
/* Stale buffers: one thread claims such a buffer, overwrites it, and marks it as clean. */
#ifndef NBDSHIM_BUFFER_H
#define NBDSHIM_BUFFER_H

#include "nbdshim.h"

/*
 * Claim a stale buffer in order to overwrite it.  Returns whether it was stale; it is then busy
 * until this thread calls nbdshim_set_clean, and no other thread can claim it.
 */
static inline bool nbdshim_claim_stale(int *state)
{
    int stale = NBDSHIM_STALE;

    return __atomic_compare_exchange_n(state, &stale, NBDSHIM_BUSY, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}

/* Publish the bytes that were written since the claim. */
static inline void nbdshim_set_clean(int *state)
{
    __atomic_store_n(state, NBDSHIM_CLEAN, __ATOMIC_RELEASE);
}

#endif
