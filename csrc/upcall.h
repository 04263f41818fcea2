// SPDX-License-Identifier: LGPL-2.0-or-later
/* What the shim calls upwards, in which thread it may, and the tokens that it hands over. */
#ifndef NBDSHIM_UPCALL_H
#define NBDSHIM_UPCALL_H

#include "nbdshim.h"

#include <stdatomic.h>

/* So often an upcall is tried, if the exception of a signal handler kept it from its work. */
#define NBDSHIM_MAX_TRIES 3

/*
 * For variables of a thread: they are in memory that the thread has from its start.  Other models
 * may allocate it at the first use, which can fail.
 */
#ifdef __GLIBC__
#define NBDSHIM_TLS __attribute__((tls_model("initial-exec")))
#else
#define NBDSHIM_TLS /* musl has no room for such variables of what is loaded later */
#endif

struct nbdshim_command;

/* The functions to call upwards (nbdglue.h); nbdshim_register sets them once. */
extern struct nbdshim_upcalls nbdshim_up;

/* What libnbd gets as user_data of a callback: a token, and its handle. */
struct nbdshim_closure {
    struct nbdshim *s;
    uintptr_t token;
    struct nbdshim_command *command; /* the one whose caller waits, or NULL */
    const char *buffer;              /* the command's, or NULL; parts of it go up as offsets */
    struct nbdshim_closure *next, *previous; /* in s->held, or in nbdshim_released */
    bool completed; /* its completion was called: libnbd 1.22's nbd_close calls it again */
    bool released;  /* a completion that returned 1 has released the token itself */
};

/*
 * Make a closure for token in *closure, which libnbd owns once it is given to it.  buffer is the
 * command's, or NULL.  command is the one whose caller waits, or NULL.  For token 0, *closure is
 * NULL.  Returns 0, or NBDSHIM_NO_MEMORY: then the token was not taken.
 */
int nbdshim_closure_new(struct nbdshim *s, uintptr_t token, const void *buffer,
                        struct nbdshim_command *command, struct nbdshim_closure **closure);

/* Hold the token of a closure: nbdshim_closure_free is the end of that. */
void nbdshim_closure_hold(struct nbdshim_closure *closure);

/* The `free` of every callback of libnbd.  The token is handed over, if it is not released yet. */
void nbdshim_closure_free(void *closure);

/* Free a closure that was never given to libnbd; NULL is ignored. */
void nbdshim_closure_drop(struct nbdshim_closure *closure);

/* Have the token of a closure that libnbd holds no more handed over when a call on its handle ends.
 */
void nbdshim_push_released(struct nbdshim_closure *closure);

/* Hand over the tokens of s that libnbd has freed in this thread.  Those not taken are kept. */
void nbdshim_hand_over(struct nbdshim *s);

/* Free the closures of s that libnbd has freed in this thread, without handing them over. */
void nbdshim_discard_released(const struct nbdshim *s);

/*
 * In a child that was forked in a callback: put /dev/null in the place of the connection's socket.
 * libnbd is in the middle of a call, and would go on with the connection, as the parent does.
 */
void nbdshim_disconnect_child(struct nbdshim *s);

/*
 * A callback that runs in this thread.  libnbd may hold the lock of the handle, so calls from
 * inside have to be refused.  The records are on the thread's stack, in a list of its own: debug
 * callbacks of one handle may run in several threads at once, in calls that take no lock.
 */
struct nbdshim_upcall {
    struct nbdshim *s;
    bool is_debug;
    unsigned forks;
    struct nbdshim_upcall *outer;
};

extern _Thread_local struct nbdshim_upcall *nbdshim_current_upcall NBDSHIM_TLS;

/* What libnbd has freed in this thread.  It is handed over when a call on its handle ends. */
extern _Thread_local struct nbdshim_closure *nbdshim_released NBDSHIM_TLS;

/* How many forks there are between the first process and this one. */
extern atomic_uint nbdshim_forks;

/* Whether the process is ending, and whether this is the thread that ends it. */
extern atomic_bool nbdshim_is_ending;
extern _Thread_local bool nbdshim_ends_here NBDSHIM_TLS;

/* Whether this thread must not call upwards any more: the functions there may be gone. */
static inline bool nbdshim_is_silent(void)
{
    return atomic_load_explicit(&nbdshim_is_ending, memory_order_relaxed) && !nbdshim_ends_here;
}

static inline void nbdshim_enter_upcall(struct nbdshim_upcall *upcall, struct nbdshim *s,
                                        bool is_debug)
{
    unsigned forks = atomic_load_explicit(&nbdshim_forks, memory_order_relaxed);

    *upcall = (struct nbdshim_upcall){s, is_debug, forks, nbdshim_current_upcall};
    nbdshim_current_upcall = upcall;
}

static inline void nbdshim_leave_upcall(struct nbdshim_upcall *upcall)
{
    nbdshim_current_upcall = upcall->outer;
    if (atomic_load_explicit(&nbdshim_forks, memory_order_relaxed) != upcall->forks)
        nbdshim_disconnect_child(upcall->s);
}

/* Whether this thread is inside an upcall of s, where libnbd's lock is held. */
static inline bool nbdshim_is_reentry(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_current_upcall;

    while (upcall != NULL && upcall->s != s)
        upcall = upcall->outer;
    return upcall != NULL;
}

/* Whether it is inside a debug callback of s, where a call would make the next debug callback. */
static inline bool nbdshim_is_debugging(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_current_upcall;

    while (upcall != NULL && !(upcall->s == s && upcall->is_debug))
        upcall = upcall->outer;
    return upcall != NULL;
}

#endif
