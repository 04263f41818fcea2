// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * The inside of a queue: what queue.c, which waits, pieces.c, which works, and watch.c share.
 *
 * The way of a piece.  `pieces_pump` cuts it off the first request and gives it to a slot.
 * `send_command` makes one command of it.  libnbd calls `complete` when the server has answered,
 * and `retire` when it has no more use for the slot; this happens in the thread that moves the
 * connection, which may be one that makes another call.  `pieces_reap` takes the answered slots in
 * the thread that waits on the queue, and `advance` decides: the next command of the same piece, or
 * its end.  A slot whose command has to wait for another one is in q->blocked, and `pieces_pump`
 * tries it again.
 *
 * Locks.  Who has q->turn moves the queue: it sends, polls and reaps.  q->lock protects the lists
 * and counters, also from callbacks, which run while libnbd's lock is held.  So libnbd is never
 * called while q->lock is locked.
 */
#ifndef NBDSHIM_QUEUE_INTERNAL_H
#define NBDSHIM_QUEUE_INTERNAL_H

#include "queue.h"
#include "queuefile.h"
#include "wait.h"

#include <unistd.h>

/* The retry interval for the turn of a handle that another thread moves. */
#define SHARED_RETRY_INTERVAL (10 * NBDSHIM_MILLISECOND)

/* A handle of the queue. */
struct member {
    struct nbdshim *s;
    enum nbdqueue_side side;
    unsigned in_flight; /* commands that libnbd has */
    int error;          /* of the connection, if it is lost */
    bool is_lost;       /* it is closed, or its connection has ended */
    bool is_entered;    /* by the thread that has the queue's turn, as has_turn */
    bool has_turn;
    bool is_shared;  /* the last time, another thread had its turn */
    int socket;      /* what the epoll watches, or -1; see watch.h */
    uint32_t events; /* what the epoll watches it for */
};

struct endpoint {
    size_t count;          /* of its handles */
    struct queuefile file; /* its fd is -1 if the end has handles */
    uint64_t size;
    uint32_t minimum, maximum; /* of the server's block size constraints; maximum 0 is none */
    bool has_zero;             /* it has a command for zeroes */
    bool is_bounded;           /* commands without data are not larger than maximum, either */
};

struct request {
    struct request *next;
    enum nbdqueue_operation operation;
    uintptr_t token;
    uint64_t serial;
    char *buffer;
    uint64_t start, cut, stop; /* the range; what is before cut was given to slots */
    uint32_t flags;
    unsigned in_flight; /* its slots */
    uint64_t moved;     /* bytes that were copied or set to zero */
    int error;          /* of the piece that failed first: */
    uint64_t error_offset, error_length;
    enum nbdqueue_side error_side;
    bool is_cancelled; /* nobody waits for it */
};

/* A piece of a request. */
struct slot {
    struct slot *next; /* free, or answered */
    struct nbdqueue *q;
    struct request *request;
    uint64_t offset, length;           /* the piece */
    uint64_t wide_offset, wide_length; /* what a command reads or writes for it */
    char *bounce;                      /* memory for wide ranges and copies; may be NULL */
    char *data;                        /* what the command reads into, or writes from */
    enum nbdqueue_operation command;   /* what is in flight */
    bool merges;                       /* it is read first, then merged and written */
    struct member *member;             /* NULL if it did not get to a handle */
    uint64_t cookie;
    uintptr_t token; /* of the request whose buffer the command uses */
    int error;
    struct nbdshim_range range; /* of an orphan, for those who have to wait for it */
    bool is_in_flight;          /* libnbd has it */
    bool is_issued;             /* the call that gives it to libnbd has returned */
    bool is_answered;           /* the completion was called */
    bool is_listed;             /* in q->answered */
    bool is_orphan;
};

struct nbdqueue {
    sem_t turn;
    pthread_mutex_t lock;
    atomic_uint references; /* the caller's, and one for each command in flight */
    int wakeup_fd;          /* an eventfd, which ends the poll of the thread that waits */
    int epoll, timer;       /* of watch.h, or -1 */
    bool is_timing;         /* the timer was started */
    bool is_sleeping;       /* the thread that waits is in poll, or the event loop is */
    bool has_news;          /* requests or handles were added while another thread had the turn */
    bool is_started;        /* a request was added: the ends are settled */
    bool is_woken, is_dropped;
    bool is_forgotten; /* dropped, and no request is left */
    unsigned depth, in_flight;
    unsigned forks; /* nbdshim_forks of the process that made the queue */
    uint32_t piece;
    struct endpoint endpoints[2];
    struct member members[NBDQUEUE_MAX_HANDLES];
    atomic_size_t added; /* members that were given to the queue; q->lock is locked to change it */
    atomic_size_t count; /* those that are in use: who has the turn takes over the others */
    struct slot *slots, *free, *answered;
    struct slot *blocked; /* not sent yet, because of what must end before; of who has the turn */
    unsigned cancelled;   /* slots of requests that were cancelled */
    struct request *queued, **last_queued;
    struct request *done, **last_done;
    unsigned length, done_length;
    unsigned reported; /* how many of those that are done the last call has reported */
    uint64_t serial;   /* of the last request */
    struct nbdshim_closure *closure; /* its token stands for the buffers */
    char *zeroes;                    /* a piece of them */
    atomic_uint_fast64_t copied, zeroed;
    _Atomic int64_t last_moved; /* when a byte last moved, in nanoseconds; 0 is never */
    atomic_bool is_moving;      /* who has the turn notes it */
    int64_t handlers_due;       /* when the handlers of signals are to run, at the latest */
};

/*
 * In the child of a fork nothing of the parent's queue is used: a thread of the parent may have
 * been in the middle of a change, with q->lock locked.
 */
static inline bool nbdqueue_is_inherited(const struct nbdqueue *q)
{
    return atomic_load_explicit(&nbdshim_forks, memory_order_relaxed) != q->forks;
}

/* Have the thread that sleeps in poll look again.  q->lock is locked. */
static inline void nbdqueue_wake_poll(struct nbdqueue *q)
{
    const uint64_t one = 1;

    if (q->is_sleeping && q->wakeup_fd >= 0)
        (void)!write(q->wakeup_fd, &one, sizeof one);
    q->is_sleeping = false;
}

/* Note that a byte has moved. */
static inline void nbdqueue_note_move(struct nbdqueue *q)
{
    atomic_store_explicit(&q->last_moved, nbdshim_now(), memory_order_relaxed);
}

#endif
