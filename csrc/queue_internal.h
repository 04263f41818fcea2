// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * The inside of a queue, shared by queue.c, which waits, pieces.c, which sends commands, and
 * watch.c, which watches sockets for an event loop.  queue.c uses the other two, and pieces.c uses
 * watch.c.
 *
 * The way of a piece.  pieces_pump cuts it off the first request and assigns it to a slot.
 * send_command sends one command for it.  libnbd calls `complete` when the server has replied, and
 * `retire` when it does not need the slot any more, both in the thread that moves the connection;
 * that may be a thread inside another call.  Either of them puts the slot into q->answered.
 * pieces_reap takes the slots from there, in the thread that has the queue's turn, and `advance`
 * sends the next command of the piece or ends the piece.  The piece of a copy is one read, and then
 * one write or zero for each run of blocks that are all data or all zeroes.  A slot whose command
 * has to wait for another command is in q->blocked, and pieces_pump tries again to send it.
 *
 * Lost connections.  A command whose connection was lost is sent again, unless nobody waits for it
 * any more; it is in q->blocked meanwhile.  The target's commands are held back there until the
 * changes of the journal are made again (see journal.h), in slots that are reserved for that.
 *
 * Locks.  The thread that has q->turn moves the queue: it sends, polls and reaps.  q->lock protects
 * the lists and counters, also from libnbd's callbacks.  These run while libnbd's lock is held, and
 * take q->lock; so libnbd must not be called while q->lock is locked.
 */
#ifndef NBDSHIM_QUEUE_INTERNAL_H
#define NBDSHIM_QUEUE_INTERNAL_H

#include "queue.h"
#include "queuefile.h"
#include "wait.h"

#include <unistd.h>

/* The retry interval for the turn of a handle that another thread is moving. */
#define SHARED_RETRY_INTERVAL (10 * NBDSHIM_MILLISECOND)
/* The number of slots that are reserved for replays and for flushes of the queue's own. */
#define RESERVED_SLOTS 8

/* A handle that belongs to the queue. */
struct member {
    struct nbdshim *_Atomic s; /* replaced only with the turn, and when nothing is in flight */
    enum nbdqueue_side side;
    unsigned in_flight; /* commands of the queue that libnbd has */
    atomic_int error;   /* why it was lost, an errno */
    bool is_new;        /* it has not been entered yet */
    bool is_lost;       /* it was closed, or its connection has ended */
    bool is_entered;    /* by the thread that has the queue's turn */
    bool has_turn;      /* likewise: it has the handle's turn as well */
    bool is_shared;     /* another thread had its turn at the last try */
    int socket;         /* that the epoll watches, or -1; see watch.h */
    uint32_t events;    /* that the epoll watches it for */
};

/* What stands at one side of the queue. */
struct endpoint {
    size_t count;          /* of its handles */
    struct queuefile file; /* its fd is -1 if the endpoint has handles */
    uint64_t size;
    uint32_t minimum, maximum; /* the server's block size constraints; a maximum of 0 is none */
    bool has_zero, can_flush;  /* the server has a zero command, and a flush command */
    bool is_null;              /* it discards what is written */
    bool is_bounded;           /* maximum also limits commands without data */
    bool can_reconnect;        /* its connections are replaced when they are lost */
    atomic_int error;          /* with which its commands fail: it was given up; or 0 */
    atomic_uint_fast64_t answers;
};

/* Who has made a request: the queue's caller, or the queue itself. */
enum origin { OF_CALLER, OF_REPLAY, OF_JOURNAL /* a flush of the journal */ };

struct request {
    struct request *next;
    enum nbdqueue_operation operation;
    uintptr_t token;
    uint64_t serial;
    char *buffer;
    uint64_t start, cut, stop; /* the range; slots have what is before cut */
    uint32_t flags;
    unsigned in_flight; /* slots that work on it */
    uint64_t moved;     /* bytes that were copied or set to zero */
    uint64_t zeroed;    /* of these, bytes that became zeroes */
    int error;          /* of the piece that failed first */
    uint64_t error_offset, error_length;
    enum nbdqueue_side error_side;
    enum nbdqueue_operation error_command;
    bool is_cancelled; /* nobody waits for it any more */
    enum origin origin;
};

/* A change of the target that is not flushed yet; see journal.h. */
struct change {
    struct request request; /* OF_REPLAY */
    struct change *next;
    uint64_t serial;
    uint64_t cost; /* its share of the journal's size */
    char data[];   /* of a write */
};

struct journal {
    uint64_t bound; /* the largest size, in bytes; 0 if there is no journal */
    uint64_t limit; /* the size at which it is flushed now */
    uint64_t size;
    uint64_t serial; /* of the latest change */
    struct change *first, **last;
    atomic_bool is_due;        /* its changes have to be made again */
    bool is_replaying;         /* they are being made again, */
    struct change *cursor;     /* and this one is next */
    uint64_t part, replayed;   /* of how many bytes a flush follows, and how many were made */
    uint64_t flush_serial;     /* the latest change that such a flush includes */
    struct request part_flush; /* such a flush: OF_REPLAY */
    unsigned in_flight;        /* slots that work on that, or on a replay that was interrupted */
    struct request flush;      /* OF_JOURNAL */
    bool is_flushing;          /* a slot works on it */
    int flush_error;           /* of the last one, for the change that waits for it */
};

/* A piece of a request, and the command in flight for it. */
struct slot {
    struct slot *next; /* in q->free, q->answered or q->blocked */
    struct nbdqueue *q;
    struct request *request;
    uint64_t offset, length;           /* of the piece, in bytes */
    uint64_t wide_offset, wide_length; /* of the command, rounded to whole blocks */
    char *bounce; /* the bounce buffer, for widened commands and copies, or NULL */
    char *data;   /* that the command reads into or writes from */
    enum nbdqueue_operation command; /* that is in flight */
    uint64_t zeroed;                 /* bytes of a copy's piece that were found to be zero */
    uint64_t written;                /* bytes that were written as data for a copy or a zero */
    uint64_t flushes;                /* a flush: the latest change that it includes */
    bool is_reserved;                /* it is one of the RESERVED_SLOTS */
    bool is_held;                    /* its command waits for the replay of the journal */
    bool merges;                     /* it reads, merges and writes back */
    struct member *member;           /* that has the command; NULL if it was not sent */
    uint64_t cookie;
    uintptr_t token; /* of the request whose buffer the command uses */
    int error;
    struct nbdshim_range range; /* of an orphan, for commands that overlap it */
    bool is_in_flight;          /* libnbd has the command */
    bool is_issued;             /* the call that passed it to libnbd has returned */
    bool is_answered;           /* `complete` was called */
    bool is_listed;             /* it is in q->answered, or being reaped */
    bool is_orphan;             /* the queue has dropped its request */
};

struct nbdqueue {
    sem_t turn;             /* its holder moves the queue */
    pthread_mutex_t lock;   /* protects the lists and counters */
    atomic_uint references; /* the caller's, and one per command in flight */
    int wakeup_fd;          /* an eventfd that ends the sleep in poll */
    int epoll, timer;       /* see watch.h; or -1 */
    bool is_timing;         /* the timer runs */
    bool is_sleeping;       /* the waiting thread, or the event loop, may be in poll */
    bool has_news;          /* something was added while another thread had the turn */
    bool is_started;        /* a request was added: the endpoints are final */
    bool is_woken, is_dropped;
    bool is_forgotten; /* dropped, and all requests are freed */
    unsigned slot_count, in_flight;
    unsigned depth; /* how many slots are not reserved */
    unsigned forks; /* nbdshim_forks of the process that created the queue */
    uint32_t piece;
    uint32_t sparse;     /* the size of the blocks in which copies find zeroes; 0 is off */
    bool target_is_zero; /* nothing is sent for zeroes */
    struct endpoint endpoints[2];
    struct member members[NBDQUEUE_MAX_HANDLES];
    atomic_size_t added; /* members that were added; changed under q->lock */
    atomic_size_t count; /* of them in use; only the turn's holder changes it */
    struct {
        struct nbdshim *s;
        enum nbdqueue_side side;
    } joining[NBDQUEUE_MAX_HANDLES]; /* handles that take the places of lost ones */
    atomic_size_t joining_count;     /* changed under q->lock */
    atomic_uint losses;
    struct journal journal;
    struct slot *slots, *free, *answered;
    struct slot *reserved; /* those of the RESERVED_SLOTS that are free */
    struct slot *blocked;  /* whose commands have to wait; used only with the turn */
    unsigned cancelled;    /* slots of cancelled requests */
    struct request *queued, **last_queued;
    struct request *done, **last_done;
    unsigned length, done_length;
    unsigned reported;               /* how many of `done` the last call has reported */
    uint64_t serial;                 /* of the latest request */
    struct nbdshim_closure *closure; /* its token keeps the buffers */
    char *zeroes;                    /* a piece full of zeroes, or NULL */
    atomic_uint_fast64_t copied, zeroed, read, written;
    _Atomic int64_t last_moved; /* when a byte last moved, monotonic; 0 is never */
    atomic_bool is_moving;      /* the turn's holder updates last_moved */
    int64_t handlers_due;       /* when signal handlers have to run at the latest */
};

/*
 * Whether the queue belongs to the parent of this forked process.  Then nothing of it may be used:
 * a thread of the parent may have been in the middle of a change, with q->lock locked.
 */
static inline bool nbdqueue_is_inherited(const struct nbdqueue *q)
{
    return atomic_load_explicit(&nbdshim_forks, memory_order_relaxed) != q->forks;
}

/* Wake the thread that sleeps in poll, so that it looks again.  q->lock is locked. */
static inline void nbdqueue_wake_poll(struct nbdqueue *q)
{
    const uint64_t one = 1;

    if (q->is_sleeping && q->wakeup_fd >= 0)
        (void)!write(q->wakeup_fd, &one, sizeof one);
    q->is_sleeping = false;
}

/* Record that a byte has moved just now. */
static inline void nbdqueue_note_move(struct nbdqueue *q)
{
    atomic_store_explicit(&q->last_moved, nbdshim_now(), memory_order_relaxed);
}

#endif
