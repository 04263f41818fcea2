// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * How a call waits for the server so that a signal handler, or the handle's timeout, can stop it.
 *
 * libnbd's own waiting calls cannot be stopped.  Therefore nbdglue.c calls the variant that does
 * not wait, nbd_aio_X, and waits here:
 *
 *   nbdshim_begin           enters the handle and takes its turn
 *   nbd_aio_X               with nbdshim_completion, if X is a command or an option
 *   nbdshim_end_command     waits for the reply, gives the turn back and leaves the handle; or
 *                           nbdshim_end_option, nbdshim_end_connect
 *
 * Turn.  The turn of a handle is a semaphore.  Only the thread that holds it may move the
 * connection, that is, poll the socket and then notify libnbd of the events.  If two threads did
 * so, one could consume the data that the other has polled for; nbd_aio_notify_read without data
 * leaves libnbd in a state in which it does not read again.
 *
 * Orphans.  NBD cannot cancel a command.  A command whose caller was stopped becomes an orphan: its
 * callbacks are not called any more, its buffer stays alive until libnbd retires it, and then its
 * tokens are released.
 *
 * Ordering.  The server may do an orphaned write after a later command.  Therefore, while an orphan
 * that changes the disk is in flight, nbdshim_begin_command and the queues hold back commands that
 * overlap its range.
 */
#ifndef NBDSHIM_WAIT_H
#define NBDSHIM_WAIT_H

#include "handle.h"

#include <limits.h>

#define NBDSHIM_SECOND INT64_C(1000000000)
#define NBDSHIM_MILLISECOND INT64_C(1000000)
#define NBDSHIM_NEVER INT64_MAX
/*
 * The longest single sleep.  A signal that arrives just before poll does not interrupt it; its
 * handler runs at most this much later.
 */
#define NBDSHIM_SLICE NBDSHIM_SECOND

/* What a call that waits for an option returns: it depends on the server's answer. */
enum nbdshim_answer {
    NBDSHIM_SUCCESS, /* 0; a refusal is a failure */
    NBDSHIM_GRANTED, /* 1, or 0 if the server refuses */
    NBDSHIM_ITEMS    /* the number of items its callback received; a refusal is a failure */
};

/* The bits of a command's state. */
#define NBDSHIM_DONE 1U   /* the server has replied, or never will */
#define NBDSHIM_ORPHAN 2U /* its caller was stopped, and has left */

/* A command or an option whose caller waits.  The last reference to go frees it. */
struct nbdshim_command {
    struct nbdshim_closure buffer; /* its token keeps an orphan's buffer; must be first */
    atomic_uint references;        /* libnbd's and the caller's */
    atomic_uint state;
    struct nbdshim_range range; /* what it changes on the disk */
    size_t size;                /* of the buffer */
    bool has_buffer_alone;      /* no other token keeps the buffer */
    int error;                  /* the errno that its completion received */
    int items;                  /* the number of calls of its other callback */
};

/* Whether a command is an orphan; if not, count the item that its callback received. */
static inline bool nbdshim_is_orphan(struct nbdshim_command *c)
{
    if (atomic_load(&c->state) & NBDSHIM_ORPHAN)
        return true;
    /* Callbacks of a handle do not run concurrently: libnbd holds its lock. */
    if (c->items < INT_MAX)
        c->items++;
    return false;
}

/* A call that waits, from nbdshim_begin to nbdshim_end_X; on the stack of its thread. */
struct nbdshim_wait {
    struct nbdshim *s;
    const char *name;
    struct nbdshim_wait *outer;      /* the call in which a callback made this one */
    struct nbdshim_command *command; /* NULL unless it is a command or an option */
    int64_t deadline;                /* monotonic, in nanoseconds */
    int64_t grace_end;               /* see is_over; 0 before the deadline */
    bool has_turn;
    bool has_waited; /* another thread had the turn first */
    bool has_moved;  /* it has moved the connection at least once */
};

/* The innermost waiting call of this thread; NULL while signal handlers run. */
extern _Thread_local struct nbdshim_wait *nbdshim_current_wait NBDSHIM_TLS;

/*
 * The function name for a debug callback of s.  A waiting call consists of several libnbd
 * functions, which its caller has not called: report the name of the waiting call instead.
 */
static inline const char *nbdshim_name_of_call(const struct nbdshim *s, const char *function)
{
    const struct nbdshim_wait *w = nbdshim_current_wait;

    return w != NULL && w->s == s ? w->name : function;
}

/*
 * Begin a call that waits; name is that of libnbd's function.  Enters the handle and waits for its
 * turn.  Returns 0, or a refusal after which there is nothing to end.
 */
int nbdshim_begin(struct nbdshim_wait *w, struct nbdshim *s, const char *name);

/* What nbdshim_begin_command needs to know about a command or an option. */
struct nbdshim_plan {
    size_t size;            /* of its buffer, in bytes */
    bool has_buffer_alone;  /* no callback's token keeps the buffer */
    bool changes;           /* it changes the disk */
    uint64_t offset, count; /* the range of the disk; a count of 0 means none */
};

/*
 * Begin a command or an option.  In addition, this completes a connect or an option that was
 * stopped, and waits while an orphan changes the same range, or while there are too many orphans.
 */
int nbdshim_begin_command(struct nbdshim_wait *w, struct nbdshim *s, const char *name,
                          const struct nbdshim_plan *plan);

/* The completion callback for the command.  libnbd takes its reference to the command. */
nbd_completion_callback nbdshim_completion(struct nbdshim_wait *w);

/* End a call that has nothing to wait for; returns ret. */
int nbdshim_end(struct nbdshim_wait *w, int ret);

/*
 * End a command; cookie is the result of nbd_aio_X.  Waits for the reply and retires the command.
 * Returns 0, -1 with libnbd's last error, or a refusal after which the command is an orphan.
 */
int nbdshim_end_command(struct nbdshim_wait *w, int64_t cookie);

/* End an option; ret is the result of nbd_aio_opt_X.  Returns as `answer` says, or a refusal. */
int nbdshim_end_option(struct nbdshim_wait *w, int ret, enum nbdshim_answer answer);

/* End a connect; ret is the result of nbd_aio_connect_X.  Returns 0, -1 or a refusal. */
int nbdshim_end_connect(struct nbdshim_wait *w, int ret);

/* The functions from here to nbdshim_notify are the building blocks that queues use as well. */

/*
 * The time of the monotonic clock, in nanoseconds, at which a timeout that starts now expires.
 * Negative seconds mean never.
 */
int64_t nbdshim_deadline(double seconds);

/* The current time of that clock. */
int64_t nbdshim_now(void);

/* The nanoseconds until `until`, at most NBDSHIM_SLICE; 0 if that is past. */
int64_t nbdshim_slice(int64_t until);

/* Wait for a turn until the deadline, but at most a slice.  Returns whether it was taken. */
bool nbdshim_wait_for_turn(sem_t *turn, int64_t deadline);

/*
 * Make the upcall `interrupted`, which runs pending signal handlers.  Returns 0, or NBDSHIM_STOPPED
 * if one of them has raised.  *has_forked is set if a handler has forked and this is the child: the
 * caller then has to call nbdshim_disconnect_child.
 */
int nbdshim_run_handlers(bool *has_forked);

/*
 * Add or remove an orphan of s with a buffer of size bytes.  The caller keeps *range in place from
 * one call to the other.
 */
void nbdshim_add_orphan(struct nbdshim *s, struct nbdshim_range *range, size_t size);
void nbdshim_remove_orphan(struct nbdshim *s, struct nbdshim_range *range, size_t size);

/* Whether an orphan of s changes a part of this range of the disk. */
bool nbdshim_is_changing(struct nbdshim *s, uint64_t start, uint64_t stop);

/*
 * Whether s has too many orphans to send another command.  in_flight is the number of other
 * commands in flight that may become orphans; size is the sum of their buffers and the command's.
 */
bool nbdshim_is_full(struct nbdshim *s, unsigned in_flight, size_t size);

/*
 * The descriptor to poll: our duplicate, because libnbd's number may belong to an unrelated file by
 * now.  While libnbd is connecting it may try several sockets in turn, so this duplicates again.
 */
int nbdshim_socket_of(struct nbdshim *s);

/*
 * Notify libnbd of the events that poll returned.  Of readable and writable it passes on only one,
 * because that may change the direction in which libnbd waits.  Returns libnbd's result.
 */
int nbdshim_notify(struct nbdshim *s, short events);

/* These wait as libnbd's functions of the same names do, but can be stopped. */
int nbdshim_aio_notify_read(struct nbdshim *s);
int nbdshim_aio_notify_write(struct nbdshim *s);
int nbdshim_poll(struct nbdshim *s, int timeout);
int nbdshim_poll2(struct nbdshim *s, int fd, int timeout);
int nbdshim_opt_abort(struct nbdshim *s);

/*
 * The same for nbd_shutdown.  With LIBNBD_SHUTDOWN_ABANDON_PENDING and commands pending, libnbd
 * itself waits, and cannot be stopped.
 */
int nbdshim_shutdown(struct nbdshim *s, uint32_t flags);

#endif
