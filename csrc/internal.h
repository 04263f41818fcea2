// SPDX-License-Identifier: LGPL-2.0-or-later
/* The struct of a handle, for the shim's own files: callers of the ABI have only pointers to it. */
#ifndef NBDSHIM_INTERNAL_H
#define NBDSHIM_INTERNAL_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <libnbd.h>

struct nbdshim_closure;

/*
 * The bit of `users` that marks a handle as closing.  The other bits count running calls, plus one
 * until nbdshim_close.
 */
#define NBDSHIM_CLOSING (1U << 31)

/* The range of the disk that an orphan changes; empty if it changes nothing. */
struct nbdshim_range {
    uint64_t start, stop;
    struct nbdshim_range *next, *previous; /* in s->changing */
};

struct nbdshim {
    struct nbd_handle *h;
    atomic_uint users;
    atomic_int socket_dup;    /* a duplicate of the socket, or -1; shutting it down ends waits */
    atomic_int socket;        /* the number of libnbd's socket, for a forked child */
    atomic_int pid;           /* of the process that connected the handle */
    atomic_bool initializes;  /* calls that do not wait clear the buffer before a read */
    atomic_uint references;   /* to this struct: its creator's, and one per queue */
    sem_t turn;               /* its holder moves the connection; see wait.h */
    atomic_uint waiters;      /* threads that wait for the turn; queues let them go first */
    _Atomic double timeout;   /* of calls that wait, in seconds; 0 is none */
    atomic_bool is_connected; /* it was; libnbd's socket does not change any more */
    atomic_bool is_stalled;   /* a connect or an option was stopped and may be unfinished */
    atomic_bool is_disconnecting; /* nbd_aio_disconnect was called */
    atomic_uint orphans;          /* how many stopped commands have not retired */
    atomic_size_t orphan_bytes;   /* the sum of the sizes of their buffers */
    pthread_mutex_t lock; /* protects the lists below; no libnbd call or upcall while locked */
    struct nbdshim_closure *held;   /* closures that libnbd has not freed yet */
    struct nbdshim_range *changing; /* non-empty ranges of orphans */
};

#endif
