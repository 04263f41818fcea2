// SPDX-License-Identifier: LGPL-2.0-or-later
/* What nbdshim.c and the generated nbdglue.c share: how a call enters a handle, and closures. */
#ifndef NBDSHIM_HANDLE_H
#define NBDSHIM_HANDLE_H

#include "nbdshim.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

#include <libnbd.h>

/* So often an upcall is tried, if the exception of a signal handler kept it from its work. */
#define NBDSHIM_TRIES 3

/* A bit of `users`: the handle is closing.  The other bits count the owner and running calls. */
#define NBDSHIM_CLOSING (1U << 31)

/*
 * For variables of a thread: they are in memory that the thread has from its start.  Other models
 * may allocate it at the first use, which can fail.
 */
#ifdef __GLIBC__
#define NBDSHIM_TLS __attribute__((tls_model("initial-exec")))
#else
#define NBDSHIM_TLS /* musl has no room for such variables of what is loaded later */
#endif

/* The range of an orphan that changes the disk; one that does not has an empty range. */
struct nbdshim_range {
    uint64_t start, stop;
    struct nbdshim_range *next, *previous; /* in s->changing */
};

struct nbdshim {
    struct nbd_handle *h;
    atomic_uint users;
    atomic_int waker;  /* a duplicate of the socket, or -1; its shutdown ends calls that wait */
    atomic_int socket; /* the number of libnbd's socket, which a forked child has to close */
    atomic_int owner;  /* the process that connected it */
    atomic_bool initializes;      /* calls that do not wait clear the buffer for a read */
    atomic_uint owners;           /* who keeps this struct in place: its maker, and queues */
    sem_t turn;                   /* who has it may wait, and move the connection; see wait.h */
    atomic_uint waiting;          /* threads that wait for the turn */
    _Atomic double timeout;       /* seconds that a call may wait; 0 for ever */
    atomic_bool is_connected;     /* it has been; libnbd's socket is the same from then on */
    atomic_bool is_stalled;       /* a connect or an option was stopped and may be unfinished */
    atomic_bool is_leaving;       /* the server was told that the connection ends */
    atomic_uint orphans;          /* commands whose caller was stopped */
    atomic_size_t orphan_bytes;   /* the sizes of their buffers */
    pthread_mutex_t lock;         /* protects what follows; nothing is called while it is locked */
    struct nbdshim_closure *held; /* the closures that libnbd has not freed yet */
    struct nbdshim_range *changing; /* the ranges of orphans that change the disk */
};

/*
 * libnbd is told not to clear the buffers of reads: the shim does it where it is needed, and not
 * for a call that waits, whose buffer is clear.  So these two are not libnbd's.
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

/* The server was told that the connection ends: nbd_shutdown must not tell it a second time. */
static inline void nbdshim_note_leaving(struct nbdshim *s)
{
    atomic_store_explicit(&s->is_leaving, true, memory_order_relaxed);
}

/*
 * The result of a call that returns a 64-bit number which the server chose: the number; -1 if the
 * call failed; NBDSHIM_TOO_LARGE if it is negative otherwise.  Older libnbd returns what the server
 * said, which may be -1 too.  It is a failure only if libnbd's last error names the call.
 */
int64_t nbdshim_number(int64_t number, const char *call);

/*
 * Duplicate the socket of the connection, which the handle then owns, and remember the process.
 * Called before a call that waits.  If there is no connection, libnbd's last error is set.
 */
void nbdshim_note_socket(struct nbdshim *s);

/*
 * In a child that was forked in a callback: put /dev/null in the place of the connection's socket.
 * libnbd is in the middle of a call, and would go on with the connection, as the parent does.
 */
void nbdshim_cut(struct nbdshim *s);

/* Close the duplicate of the socket if the connection has ended, so that the server sees the end.
 */
void nbdshim_note_end(struct nbdshim *s);

struct nbdshim_command;

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
 * End what nbdshim_enter began.  The last call to leave a closing handle closes libnbd's handle.
 * Then the tokens are handed over that libnbd has freed in this thread.  The caller keeps s in
 * place.
 */
void nbdshim_leave(struct nbdshim *s);

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

/* Have the token of a closure that libnbd holds no more handed over when a call on its handle ends.
 */
void nbdshim_push_released(struct nbdshim_closure *closure);

/* Hand over the tokens of s that libnbd has freed in this thread.  Those not taken are kept. */
void nbdshim_hand_over(struct nbdshim *s);

/* Let go of the memory of s; the last owner frees it. */
void nbdshim_disown(struct nbdshim *s);

/* Free a closure that was never given to libnbd; NULL is ignored. */
void nbdshim_closure_drop(struct nbdshim_closure *closure);

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

extern _Thread_local struct nbdshim_upcall *nbdshim_innermost NBDSHIM_TLS;

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

/* Whether it is inside a debug callback of s, where a call would make the next debug callback. */
static inline bool nbdshim_is_debugging(const struct nbdshim *s)
{
    const struct nbdshim_upcall *upcall = nbdshim_innermost;

    while (upcall != NULL && !(upcall->s == s && upcall->is_debug))
        upcall = upcall->outer;
    return upcall != NULL;
}

/* Count a call on s, unless s is closing or NULL.  Returns 0 or NBDSHIM_CLOSED. */
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

/* The same for a call of libnbd that takes its lock; may also return NBDSHIM_REENTERED. */
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
