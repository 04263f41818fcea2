// SPDX-License-Identifier: LGPL-2.0-or-later
/* A handle, and how a call enters it. */
#ifndef NBDSHIM_HANDLE_H
#define NBDSHIM_HANDLE_H

#include "upcall.h"

#include <pthread.h>
#include <semaphore.h>

#include <libnbd.h>

/* A bit of `users`: the handle is closing.  The other bits count the owner and running calls. */
#define NBDSHIM_CLOSING (1U << 31)

/* The range of an orphan that changes the disk; one that does not has an empty range. */
struct nbdshim_range {
    uint64_t start, stop;
    struct nbdshim_range *next, *previous; /* in s->changing */
};

struct nbdshim {
    struct nbd_handle *h;
    atomic_uint users;
    atomic_int socket_dup; /* a duplicate of the socket, or -1; its shutdown ends calls that wait */
    atomic_int socket;     /* the number of libnbd's socket, which a forked child has to close */
    atomic_int pid;        /* the process that connected it */
    atomic_bool initializes;      /* calls that do not wait clear the buffer for a read */
    atomic_uint references;       /* who keeps this struct in place: its maker, and queues */
    sem_t turn;                   /* who has it may wait, and move the connection; see wait.h */
    atomic_uint waiters;          /* threads that wait for the turn */
    _Atomic double timeout;       /* seconds that a call may wait; 0 for ever */
    atomic_bool is_connected;     /* it has been; libnbd's socket is the same from then on */
    atomic_bool is_stalled;       /* a connect or an option was stopped and may be unfinished */
    atomic_bool is_disconnecting; /* the server was told that the connection ends */
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
static inline void nbdshim_note_disconnect(struct nbdshim *s)
{
    atomic_store_explicit(&s->is_disconnecting, true, memory_order_relaxed);
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

/* Close the duplicate of the socket if the connection has ended, so that the server sees the end.
 */
void nbdshim_note_end(struct nbdshim *s);

/*
 * End what nbdshim_enter began.  The last call to leave a closing handle closes libnbd's handle.
 * Then the tokens are handed over that libnbd has freed in this thread.  The caller keeps s in
 * place.
 */
void nbdshim_leave(struct nbdshim *s);

/* Let go of the memory of s; the last owner frees it. */
void nbdshim_unref(struct nbdshim *s);

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
