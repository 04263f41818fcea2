// SPDX-License-Identifier: LGPL-2.0-or-later
/* What nbdshim.c and the generated nbdglue.c share: entering a handle, and closures. */
#ifndef NBDSHIM_HANDLE_H
#define NBDSHIM_HANDLE_H

#include "nbdshim.h"

#include <pthread.h>
#include <stdatomic.h>

#include <libnbd.h>

/* The low bits of `users` count the owner and the calls that are running. */
#define NBDSHIM_CLOSING (1U << 31)

struct nbdshim {
    struct nbd_handle *h;
    atomic_uint users;
    atomic_uintptr_t calling_up; /* the thread that is inside a callback of this handle, or 0 */
    atomic_int socket;           /* the connection's, or -1: what wakes a call that waits */
};

/*
 * A 64-bit number that libnbd returned and a server chose: number, or NBDSHIM_TOO_LARGE.  A -1 is a
 * failure only if libnbd's error names the call; older libnbd returns what the server said.
 */
int64_t nbdshim_number(int64_t number, const char *call);

/* Remember the socket of a connection, before a call that waits; sets libnbd's error if none. */
void nbdshim_note_socket(struct nbdshim *s);

/* A token given to libnbd as user_data. */
struct nbdshim_closure {
    struct nbdshim *s;
    uintptr_t token;
    bool released; /* by a completion callback that returned 1 */
};

/* Leave after nbdshim_enter returned 0; the last to leave a closing handle ends it. */
void nbdshim_leave(struct nbdshim *s);

/*
 * Remember token for libnbd, in *closure; nothing to do if token is 0.
 * Returns 0, or NBDSHIM_NO_MEMORY: then the token is released.
 */
int nbdshim_closure_new(struct nbdshim *s, uintptr_t token, struct nbdshim_closure **closure);

/* libnbd's `free` of every callback: releases the token, unless that was done, and the memory. */
void nbdshim_closure_free(void *closure);

/* Release a token that libnbd has never seen; 0 is ignored. */
void nbdshim_release(uintptr_t token);

static inline uintptr_t nbdshim_this_thread(void)
{
    return (uintptr_t)pthread_self();
}

/* Whether this thread is inside a callback of s, where libnbd's lock is held. */
static inline bool nbdshim_is_reentry(struct nbdshim *s)
{
    return atomic_load_explicit(&s->calling_up, memory_order_relaxed) == nbdshim_this_thread();
}

/* Take part in s, unless it is closing.  Returns 0 or NBDSHIM_CLOSED. */
static inline int nbdshim_enter_unlocked(struct nbdshim *s)
{
    unsigned users = atomic_load_explicit(&s->users, memory_order_relaxed);
    do {
        if (users & NBDSHIM_CLOSING)
            return NBDSHIM_CLOSED;
    } while (!atomic_compare_exchange_weak_explicit(&s->users, &users, users + 1,
                                                    memory_order_acquire, memory_order_relaxed));
    return 0;
}

/* The same for a call that takes libnbd's lock: also NBDSHIM_REENTERED. */
static inline int nbdshim_enter(struct nbdshim *s)
{
    return nbdshim_is_reentry(s) ? NBDSHIM_REENTERED : nbdshim_enter_unlocked(s);
}

/* Mark this thread as inside a callback of s, until nbdshim_came_back with what this returned. */
static inline uintptr_t nbdshim_call_up(struct nbdshim *s)
{
    return atomic_exchange_explicit(&s->calling_up, nbdshim_this_thread(), memory_order_relaxed);
}

static inline void nbdshim_came_back(struct nbdshim *s, uintptr_t before)
{
    atomic_store_explicit(&s->calling_up, before, memory_order_relaxed);
}

#endif
