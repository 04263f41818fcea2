// SPDX-License-Identifier: LGPL-2.0-or-later
/* A handle, and how a call enters and leaves it. */
#ifndef NBDSHIM_HANDLE_H
#define NBDSHIM_HANDLE_H

#include "internal.h"
#include "upcall.h"

/*
 * These two replace libnbd's functions.  The shim turns libnbd's clearing off and clears buffers
 * itself where that is needed: a call that waits already gets a clear buffer.
 */
static inline int nbdshim_set_pread_initialize(struct nbdshim *s, bool initialize)
{
    atomic_store_explicit(&s->initializes, initialize, memory_order_relaxed);
    return 0;
}

static inline int nbdshim_get_pread_initialize(struct nbdshim *s)
{
    return atomic_load_explicit(&s->initializes, memory_order_relaxed);
}

/* Record that nbd_aio_disconnect was called: nbd_shutdown must not send a second disconnect. */
static inline void nbdshim_note_disconnect(struct nbdshim *s)
{
    atomic_store_explicit(&s->is_disconnecting, true, memory_order_relaxed);
}

/*
 * Check the result of a call that returns a 64-bit number chosen by the server.  Returns the
 * number, -1 if the call failed, or NBDSHIM_TOO_LARGE if the number is negative.  Some versions of
 * libnbd return the server's number unchecked, and it can be -1 as well; so -1 counts as a failure
 * only if libnbd's last error names the call.
 */
int64_t nbdshim_number(int64_t number, const char *call);

/*
 * Duplicate the connection's socket, and record the process that owns the connection.  The handle
 * owns the duplicate.  Without a connection there is no duplicate, and libnbd's last error is set.
 */
void nbdshim_note_socket(struct nbdshim *s);

/* Close the duplicate of the socket if the connection has ended, so that the server sees EOF. */
void nbdshim_note_end(struct nbdshim *s);

/*
 * Leave a handle that nbdshim_enter has entered.  The last call to leave a closing handle closes
 * libnbd's handle.  Then release the tokens whose closures libnbd has freed in this thread.  The
 * caller holds a reference to s, or its owner does until this returns.
 */
void nbdshim_leave(struct nbdshim *s);

/* Drop a reference to s; the last one frees it. */
void nbdshim_unref(struct nbdshim *s);

/*
 * Count a call on s, unless s is closing or NULL.  Returns 0 or NBDSHIM_CLOSED.  While the call is
 * counted, nbdshim_close in another thread cannot close s->h.
 */
static inline int nbdshim_join(struct nbdshim *s)
{
    unsigned users;

    if (s == NULL)
        return NBDSHIM_CLOSED;
    users = atomic_load_explicit(&s->users, memory_order_relaxed);
    do {
        if (users & NBDSHIM_CLOSING)
            return NBDSHIM_CLOSED;
    } while (!atomic_compare_exchange_weak_explicit(&s->users, &users, users + 1,
                                                    memory_order_acquire, memory_order_relaxed));
    return 0;
}

/* Enter s for a libnbd call that takes its lock.  Returns 0, NBDSHIM_CLOSED or _REENTERED. */
static inline int nbdshim_enter(struct nbdshim *s)
{
    return nbdshim_is_reentry(s) ? NBDSHIM_REENTERED : nbdshim_join(s);
}

/* Enter s for a libnbd call that takes no lock; returns the same. */
static inline int nbdshim_enter_unlocked(struct nbdshim *s)
{
    return nbdshim_is_debugging(s) ? NBDSHIM_REENTERED : nbdshim_join(s);
}

#endif
