// SPDX-License-Identifier: LGPL-2.0-or-later
/* Upcalls: which thread may make them, and how closures carry tokens from a call to `release`. */
#ifndef NBDSHIM_UPCALL_H
#define NBDSHIM_UPCALL_H

#include "nbdshim.h"

#include <stdatomic.h>

/* How often an upcall is tried if a signal handler raises before it has done its work. */
#define NBDSHIM_MAX_TRIES 3

/*
 * The memory of these thread-local variables exists from the start of a thread.  Other TLS models
 * may allocate it at first use, which can fail.
 */
#ifdef __GLIBC__
#define NBDSHIM_TLS __attribute__((tls_model("initial-exec")))
#else
#define NBDSHIM_TLS /* musl reserves no such memory for libraries that are loaded later */
#endif

struct nbdshim_command;

/* The upcalls (struct in nbdglue.h), set once by nbdshim_register. */
extern struct nbdshim_upcalls nbdshim_up;

/* The user_data of a libnbd callback: a token and its handle. */
struct nbdshim_closure {
    struct nbdshim *s;
    uintptr_t token;
    struct nbdshim_command *command; /* whose caller waits, or NULL */
    const char *buffer;              /* of the command, or NULL; upcalls get offsets into it */
    struct nbdshim_closure *next, *previous; /* in s->held or nbdshim_released */
    bool completed; /* its completion was called; nbd_close of libnbd 1.22 calls it again */
    bool released;  /* its completion returned 1, and so has released the token */
};

/*
 * Create a closure for a token and hold the token.  libnbd owns *closure once it was passed to it;
 * until then nbdshim_closure_drop frees it.  buffer and command are those of the struct.  For token
 * 0, *closure is NULL.  Returns 0, or NBDSHIM_NO_MEMORY without having taken the token.
 */
int nbdshim_closure_new(struct nbdshim *s, uintptr_t token, const void *buffer,
                        struct nbdshim_command *command, struct nbdshim_closure **closure);

/* Hold the token of a closure until nbdshim_closure_free. */
void nbdshim_closure_hold(struct nbdshim_closure *closure);

/* The `free` function of every libnbd callback.  Queues the token for `release`, if needed. */
void nbdshim_closure_free(void *closure);

/* Free a closure that was never passed to libnbd; NULL is ignored. */
void nbdshim_closure_drop(struct nbdshim_closure *closure);

/* Queue a closure that libnbd has freed; the end of a call on its handle releases its token. */
void nbdshim_push_released(struct nbdshim_closure *closure);

/* Release the tokens of s that this thread has queued.  If `release` fails, they stay queued. */
void nbdshim_release_tokens(struct nbdshim *s);

/* Free the closures of s that this thread has queued, without releasing their tokens. */
void nbdshim_discard_released(const struct nbdshim *s);

/*
 * Replace the connection's socket by /dev/null, in a child that was forked inside an upcall.  There
 * libnbd is in the middle of a call, and would continue to use the connection, as the parent does.
 */
void nbdshim_disconnect_child(struct nbdshim *s);

/*
 * An upcall that runs in this thread.  libnbd may hold the handle's lock, so calls from inside have
 * to be refused.  Each thread has a list of these records, on its stack.  One record per handle
 * would not do: calls that take no lock may make debug callbacks in several threads at once.
 */
struct nbdshim_upcall {
    struct nbdshim *s;
    bool is_debug;
    unsigned forks;
    struct nbdshim_upcall *outer;
};

extern _Thread_local struct nbdshim_upcall *nbdshim_current_upcall NBDSHIM_TLS;

/* Closures that libnbd has freed in this thread, and whose tokens are to be released. */
extern _Thread_local struct nbdshim_closure *nbdshim_released NBDSHIM_TLS;

/* How many forks lie between the first process and this one. */
extern atomic_uint nbdshim_forks;

/* Whether the process is ending, and whether this is the thread that ends it. */
extern atomic_bool nbdshim_is_ending;
extern _Thread_local bool nbdshim_ends_here NBDSHIM_TLS;

/* Whether this thread must not make upcalls any more, because the functions may be gone. */
static inline bool nbdshim_is_silent(void)
{
    return atomic_load_explicit(&nbdshim_is_ending, memory_order_relaxed) && !nbdshim_ends_here;
}

/* Mark this thread as inside an upcall of s, until nbdshim_leave_upcall. */
static inline void nbdshim_enter_upcall(struct nbdshim_upcall *upcall, struct nbdshim *s,
                                        bool is_debug)
{
    unsigned forks = atomic_load_explicit(&nbdshim_forks, memory_order_relaxed);

    *upcall = (struct nbdshim_upcall){s, is_debug, forks, nbdshim_current_upcall};
    nbdshim_current_upcall = upcall;
}

/* Remove the mark.  If the upcall has forked and this is the child, it loses its connection. */
static inline void nbdshim_leave_upcall(struct nbdshim_upcall *upcall)
{
    nbdshim_current_upcall = upcall->outer;
    if (atomic_load_explicit(&nbdshim_forks, memory_order_relaxed) != upcall->forks)
        nbdshim_disconnect_child(upcall->s);
}

/* Whether this thread is inside an upcall of s, where it may hold libnbd's lock. */
static inline bool nbdshim_is_reentry(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_current_upcall;

    while (upcall != NULL && upcall->s != s)
        upcall = upcall->outer;
    return upcall != NULL;
}

/* Whether this thread is inside a debug callback of s, where any call would cause another one. */
static inline bool nbdshim_is_debugging(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_current_upcall;

    while (upcall != NULL && !(upcall->s == s && upcall->is_debug))
        upcall = upcall->outer;
    return upcall != NULL;
}

#endif
