// SPDX-License-Identifier: LGPL-2.0-or-later
/* What nbdshim.c and the generated nbdglue.c share: entering a handle, and closures. */
#ifndef NBDSHIM_HANDLE_H
#define NBDSHIM_HANDLE_H

#include "nbdshim.h"

#include <pthread.h>
#include <stdatomic.h>

#include <libnbd.h>

/* How often an upcall is tried that a signal handler's exception kept from its work. */
#define NBDSHIM_TRIES 3

/* The low bits of `users` count the owner and the calls that are running. */
#define NBDSHIM_CLOSING (1U << 31)

/* In the block that every thread has from its start: the others may be allocated on first use. */
#define NBDSHIM_TLS __attribute__((tls_model("initial-exec")))

struct nbdshim {
    struct nbd_handle *h;
    atomic_uint users;
    atomic_int waker;       /* a duplicate of the connection's socket, or -1: wakes who waits */
    atomic_int socket;      /* the number of the connection's socket, for a child of a fork */
    atomic_int owner;       /* the process that connected it */
    atomic_bool leaves_old; /* libnbd may not clear what it reads into */
    pthread_mutex_t lock;   /* of `held`; nothing is called under it */
    struct nbdshim_closure *held; /* what libnbd has */
};

/* Before libnbd is told not to clear what it reads into; it is not asked, for it would log that. */
static inline void nbdshim_note_leaving_old(struct nbdshim *s)
{
    atomic_store_explicit(&s->leaves_old, true, memory_order_relaxed);
}

/* Whether the shim has to clear bytes that may not be seen before a read. */
static inline bool nbdshim_leaves_old(struct nbdshim *s)
{
    return atomic_load_explicit(&s->leaves_old, memory_order_relaxed);
}

/*
 * A 64-bit number that libnbd returned and a server chose: number, or NBDSHIM_TOO_LARGE.  A -1 is a
 * failure only if libnbd's error names the call; older libnbd returns what the server said.
 */
int64_t nbdshim_number(int64_t number, const char *call);

/*
 * Duplicate the socket of a connection, and remember whose it is, before a call that waits; sets
 * libnbd's error if there is none.
 */
void nbdshim_note_socket(struct nbdshim *s);

/*
 * In a child that was forked in a callback: have nothing in place of the connection's socket, which
 * libnbd, in the middle of a call, has open.
 */
void nbdshim_cut(struct nbdshim *s);

/* Let go of the socket's duplicate if the connection has ended: the server is to see that. */
void nbdshim_note_end(struct nbdshim *s);

/* A token given to libnbd as user_data. */
struct nbdshim_closure {
    struct nbdshim *s;
    uintptr_t token;
    const char *buffer; /* of the command; callbacks tell of parts of it by their offsets in it */
    struct nbdshim_closure *next, *previous; /* in the handle's lists */
    bool completed; /* the completion callback was called: libnbd 1.22's nbd_close does it again */
    bool released;  /* by a completion callback that returned 1 */
};

/*
 * Leave after nbdshim_enter returned 0; the last to leave a closing handle ends it.  Tokens that
 * were freed are handed over.  The caller keeps s in place.
 */
void nbdshim_leave(struct nbdshim *s);

/*
 * Hold token for libnbd, in *closure, and the command's buffer, if it has one, for callbacks;
 * nothing to do if token is 0.  Returns 0, or NBDSHIM_NO_MEMORY: then the token was not taken.
 */
int nbdshim_closure_new(struct nbdshim *s, uintptr_t token, const void *buffer,
                        struct nbdshim_closure **closure);

/* libnbd's `free` of every callback: the token is to be handed over, unless that was done. */
void nbdshim_closure_free(void *closure);

/* Undo nbdshim_closure_new for a closure that libnbd has never seen; NULL is ignored. */
void nbdshim_closure_drop(struct nbdshim_closure *closure);

/* Claim a buffer for overwriting: whether it was stale.  Then it is busy until it is said clean. */
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

/*
 * What calls up.  While a callback runs, libnbd may hold its lock: the thread keeps a note of it,
 * on its stack, for calls from there to be refused.  A thread's own list, because debug callbacks
 * run in calls that take no lock too, in several threads at once.
 */
struct nbdshim_upcall {
    struct nbdshim *s;
    bool is_debug;
    unsigned forks;
    struct nbdshim_upcall *outer;
};

extern _Thread_local struct nbdshim_upcall *nbdshim_innermost NBDSHIM_TLS;

/* What libnbd has freed in calls of this thread: handed over when a call on its handle ends. */
extern _Thread_local struct nbdshim_closure *nbdshim_released NBDSHIM_TLS;

/* How often this process was forked from another. */
extern atomic_uint nbdshim_forks;

/* Whether the process ends, and whether this is the thread in which it does. */
extern atomic_bool nbdshim_is_ending;
extern _Thread_local bool nbdshim_ends_here NBDSHIM_TLS;

/* Whether what is called upwards may be gone by the time that this thread gets there. */
static inline bool nbdshim_is_silent(void)
{
    return atomic_load_explicit(&nbdshim_is_ending, memory_order_relaxed) && !nbdshim_ends_here;
}

static inline void nbdshim_call_up(struct nbdshim_upcall *upcall, struct nbdshim *s, bool is_debug)
{
    unsigned forks = atomic_load_explicit(&nbdshim_forks, memory_order_relaxed);

    *upcall = (struct nbdshim_upcall){s, is_debug, forks, nbdshim_innermost};
    nbdshim_innermost = upcall;
}

static inline void nbdshim_came_back(struct nbdshim_upcall *upcall)
{
    nbdshim_innermost = upcall->outer;
    if (atomic_load_explicit(&nbdshim_forks, memory_order_relaxed) != upcall->forks)
        nbdshim_cut(upcall->s);
}

/* Whether this thread is inside an upcall of s, where libnbd's lock is held. */
static inline bool nbdshim_is_reentry(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_innermost;

    while (upcall != NULL && upcall->s != s)
        upcall = upcall->outer;
    return upcall != NULL;
}

/* Whether it is inside a debug callback of s: every call would debug itself, without end. */
static inline bool nbdshim_is_debugging(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_innermost;

    while (upcall != NULL && !(upcall->s == s && upcall->is_debug))
        upcall = upcall->outer;
    return upcall != NULL;
}

/* Take part in s, unless it is closing or NULL.  Returns 0 or NBDSHIM_CLOSED. */
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

/* The same for a call of libnbd: also NBDSHIM_REENTERED. */
static inline int nbdshim_enter(struct nbdshim *s)
{
    return nbdshim_is_reentry(s) ? NBDSHIM_REENTERED : nbdshim_join(s);
}

/* The same for a call that takes no lock. */
static inline int nbdshim_enter_unlocked(struct nbdshim *s)
{
    return nbdshim_is_debugging(s) ? NBDSHIM_REENTERED : nbdshim_join(s);
}

#endif
