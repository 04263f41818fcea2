// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * How a call waits for the server so that a signal handler, or the handle's timeout, can stop it.
 *
 * libnbd's own calls that wait cannot be stopped.  So nbdglue.c calls the form that does not wait,
 * nbd_aio_X, and waits here:
 *
 *   nbdshim_begin           enters the handle and takes its turn
 *   nbd_aio_X               with nbdshim_completion, if X is a command or an option
 *   nbdshim_end_command     waits for the reply, gives the turn back and leaves the handle; or
 *                           nbdshim_end_option, nbdshim_end_connect
 *
 * Turn.  One thread at a time waits on a handle, and moves its connection.  It polls the socket and
 * then tells libnbd of what poll has said.  Nobody else may tell libnbd something in between: a
 * nbd_aio_notify_read with nothing to read leaves libnbd in a state in which it reads no more.
 *
 * Orphans.  NBD cannot take a command back.  One whose caller was stopped is an orphan: its
 * callbacks are not called any more, its buffer stays in place until libnbd retires it, and then
 * its tokens are released.
 */
#ifndef NBDSHIM_WAIT_H
#define NBDSHIM_WAIT_H

#include "handle.h"

#include <limits.h>

#define NBDSHIM_SECOND INT64_C(1000000000)
#define NBDSHIM_MILLISECOND INT64_C(1000000)
#define NBDSHIM_NEVER INT64_MAX
/*
 * No wait is longer at a time.  A signal that arrives just before poll does not end it: then the
 * handler runs after so long.
 */
#define NBDSHIM_SLICE NBDSHIM_SECOND

/* What the server's answer to an option means for the call that waits for it. */
enum nbdshim_answer {
    NBDSHIM_SUCCESS, /* 0, or a failure */
    NBDSHIM_GRANTED, /* 1, or 0 if the server refuses; neither is a failure */
    NBDSHIM_ITEMS    /* how many items its callback got, or a failure */
};

/* Bits of the state of a command. */
#define NBDSHIM_DONE 1U   /* the server has answered, or never will */
#define NBDSHIM_ORPHAN 2U /* its caller was stopped */

/* A command or an option whose caller waits.  It is freed by the last who refers to it. */
struct nbdshim_command {
    struct nbdshim_closure buffer; /* its token stands for the buffer of an orphan; must be first */
    atomic_uint references;        /* libnbd's, and the caller's */
    atomic_uint state;
    struct nbdshim_range range; /* what it changes of the disk, if anything */
    size_t size;                /* of the buffer */
    bool has_buffer_alone;      /* no other token stands for the buffer */
    int error;                  /* what its completion was told */
    int items;                  /* how often its other callback was called */
};

/* Whether the caller of a command was stopped; if not, one item more has arrived for it. */
static inline bool nbdshim_is_orphan(struct nbdshim_command *c)
{
    if (atomic_load(&c->state) & NBDSHIM_ORPHAN)
        return true;
    if (c->items < INT_MAX)
        c->items++;
    return false;
}

/* A call that waits, from nbdshim_begin to nbdshim_end_X. */
struct nbdshim_wait {
    struct nbdshim *s;
    const char *name;
    struct nbdshim_wait *outer;      /* the call of this thread in which a handler made this one */
    struct nbdshim_command *command; /* NULL if the call is neither a command nor an option */
    int64_t deadline;                /* of the monotonic clock, in nanoseconds */
    int64_t grace_end;               /* when it ends at the latest; 0 before the deadline */
    bool has_turn;
    bool has_waited; /* another thread had the turn */
    bool has_moved;  /* it has let libnbd go on at least once */
};

/* The innermost call that waits in this thread; NULL while handlers run. */
extern _Thread_local struct nbdshim_wait *nbdshim_current_wait NBDSHIM_TLS;

/*
 * The function that a debug callback of s is told of.  Inside of a call that waits, these are the
 * functions that it is made of; the caller knows the call itself.
 */
static inline const char *nbdshim_name_of_call(const struct nbdshim *s, const char *function)
{
    const struct nbdshim_wait *w = nbdshim_current_wait;

    return w != NULL && w->s == s ? w->name : function;
}

/*
 * Begin a call that waits, nbd_NAME: enter the handle, and wait for the turn.  If it returns not 0
 * but a refusal, nothing has begun.
 */
int nbdshim_begin(struct nbdshim_wait *w, struct nbdshim *s, const char *name);

/* What nbdshim_begin_command has to know of a command or an option. */
struct nbdshim_plan {
    size_t size;            /* of its buffer in bytes */
    bool has_buffer_alone;  /* no token of a callback stands for the buffer */
    bool changes;           /* it changes the disk */
    uint64_t offset, count; /* the range of the disk; count is 0 if it has none */
};

/*
 * The same for a command or an option.  Waits also for the end of a connect or option that was
 * stopped, for orphans that change the same range, and for room for one orphan more.
 */
int nbdshim_begin_command(struct nbdshim_wait *w, struct nbdshim *s, const char *name,
                          const struct nbdshim_plan *plan);

/* The completion callback of the command; libnbd frees it. */
nbd_completion_callback nbdshim_completion(struct nbdshim_wait *w);

/* End a call that has done nothing to wait for; returns ret. */
int nbdshim_end(struct nbdshim_wait *w, int ret);

/*
 * End a command: cookie is what nbd_aio_X has returned.  Waits for the reply and retires the
 * command.  Returns 0, -1 with libnbd's last error, or a refusal.
 */
int nbdshim_end_command(struct nbdshim_wait *w, int64_t cookie);

/* End an option: ret is what nbd_aio_opt_X has returned. */
int nbdshim_end_option(struct nbdshim_wait *w, int ret, enum nbdshim_answer answer);

/* End a connect: ret is what nbd_aio_connect_X has returned. */
int nbdshim_end_connect(struct nbdshim_wait *w, int ret);

/*
 * The parts of waiting, which a queue needs too.
 *
 * A time of the monotonic clock, in nanoseconds, after so many seconds; less than 0 is never.
 */
int64_t nbdshim_deadline(double seconds);

/* The time of that clock. */
int64_t nbdshim_now(void);

/* How many nanoseconds to wait at once, until `until`; 0 if that is past. */
int64_t nbdshim_slice(int64_t until);

/* Wait a slice for a turn, at the most until the deadline.  Returns whether it was taken. */
bool nbdshim_wait_for_turn(sem_t *turn, int64_t deadline);

/*
 * Let Python run the handlers of signals that have arrived.  Returns 0 or, if one of them has
 * raised an exception, NBDSHIM_STOPPED.  *has_forked says that this is the child of a fork now: the
 * caller cuts its connections.
 */
int nbdshim_run_handlers(bool *has_forked);

/*
 * Count an orphan of s with a buffer of size bytes, and list its range until it is removed.  The
 * caller keeps *range in place until then.
 */
void nbdshim_add_orphan(struct nbdshim *s, struct nbdshim_range *range, size_t size);
void nbdshim_remove_orphan(struct nbdshim *s, struct nbdshim_range *range, size_t size);

/* Whether an orphan of s changes a part of a range. */
bool nbdshim_is_changing(struct nbdshim *s, uint64_t start, uint64_t stop);

/*
 * Whether s has too many orphans for one command more.  in_flight is how many others are in flight
 * that may become orphans, size the bytes of their buffers and of that of the command.
 */
bool nbdshim_is_full(struct nbdshim *s, unsigned in_flight, size_t size);

/*
 * The descriptor to poll: our own duplicate, since libnbd's number may be a stranger's by now.
 * While libnbd is connecting, it may try one socket after the other.
 */
int nbdshim_socket_of(struct nbdshim *s);

/*
 * Tell libnbd what poll has said.  Of reading and writing only one is told: the first may change
 * what libnbd waits for.  Returns libnbd's result.
 */
int nbdshim_notify(struct nbdshim *s, short events);

/* The same calls of libnbd, from beginning to end. */
int nbdshim_aio_notify_read(struct nbdshim *s);
int nbdshim_aio_notify_write(struct nbdshim *s);
int nbdshim_poll(struct nbdshim *s, int timeout);
int nbdshim_poll2(struct nbdshim *s, int fd, int timeout);
int nbdshim_opt_abort(struct nbdshim *s);

/* The same for nbd_shutdown.  With LIBNBD_SHUTDOWN_ABANDON_PENDING it may be one that cannot be
 * stopped. */
int nbdshim_shutdown(struct nbdshim *s, uint32_t flags);

#endif
