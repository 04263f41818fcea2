// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * nbdqueue: many commands in flight, over one handle or several, without an upcall for each.
 *
 * Requests.  A request is given to the queue by nbdqueue_submit.  It is cut into pieces: commands
 * as large as the queue's piece and the server's block size constraints allow.  So many commands as
 * the queue's depth are in flight, in the order of the requests; the server may answer them in any
 * order.  When all pieces of a request are done, nbdqueue_wait tells of it, once, with its first
 * error.  After an error no more pieces of that request are sent.
 *
 * Ends.  A queue has a target, and for NBDQUEUE_COPY also a source.  All requests but the copy's
 * read are made to the target.  An end is one file, or one handle or several of the same export.
 *
 * Alignment.  If the target has a minimum block size, a read that is not aligned is read wider.  A
 * write that is not aligned is read, merged and written; the queue sends no other write to these
 * blocks meanwhile.  A zero is merged at its edges; a trim leaves its edges out.  A copy has to be
 * aligned to both ends, except for the end of the source.  A block at the end of the export is as
 * short as the export.  Where the server has no command for zeroes, they are written.
 *
 * Buffers.  The caller keeps a buffer in place until its request was told of.  When a queue is
 * dropped, commands in flight become orphans (see wait.h).  Then the token of the queue is handed
 * over by the upcall `release` when no command can use a buffer any more.
 *
 * Order.  Commands are not ordered, with one exception.  What nobody waits for any more, because it
 * was cancelled or its caller was stopped, may still happen: so a command that overlaps such a
 * write, zero or trim is held back until that one has ended.
 *
 * NULL stands for a queue that was destroyed: it refuses as one that was dropped.
 *
 * Threads.  Any thread may call any function, except nbdqueue_destroy.  One thread at a time waits.
 * It moves the connections, and it lets calls that wait on one of the handles go first.
 *
 * Fork.  In the child of a fork a queue of the parent refuses as one that was dropped, and dropping
 * it closes its descriptors: a thread of the parent may have been in the middle of a call.  The
 * buffers of its requests are kept until the child ends.
 */
#ifndef NBDSHIM_QUEUE_H
#define NBDSHIM_QUEUE_H

#include "nbdshim.h"

/* The largest number of handles that a queue takes. */
enum { NBDQUEUE_MAX_HANDLES = 64 };

enum nbdqueue_side { NBDQUEUE_TARGET, NBDQUEUE_SOURCE };

enum nbdqueue_operation {
    NBDQUEUE_READ,
    NBDQUEUE_WRITE,
    NBDQUEUE_ZERO,
    NBDQUEUE_TRIM,
    NBDQUEUE_CACHE,
    NBDQUEUE_FLUSH,
    NBDQUEUE_COPY /* read from the source, and write to the target */
};

/* A request that is done. */
struct nbdqueue_done {
    uintptr_t token;
    uint64_t serial; /* of the request in this queue; nbdqueue_take needs it */
    uint64_t offset; /* the piece that failed first: where it starts, */
    uint64_t length; /* and its size in bytes, without what was added for the alignment */
    uint64_t moved;  /* bytes of the request that were copied or set to zero */
    int error;       /* the errno of the piece that failed first, or 0 */
    int side;        /* enum nbdqueue_side: where it failed */
};

struct nbdqueue;

/*
 * A new queue, to be ended by nbdqueue_destroy; NULL with errno if there is no memory or no
 * descriptor left.  depth is how many commands are in flight, piece the size of the largest in
 * bytes.  token stands for the buffers of all requests.
 */
struct nbdqueue *nbdqueue_create(unsigned depth, uint32_t piece, uintptr_t token);

/*
 * The same for a caller whom a signal may interrupt before it has the result: *made is set. Returns
 * 0 or an errno.
 */
int nbdqueue_make(struct nbdqueue **made, unsigned depth, uint32_t piece, uintptr_t token);

/*
 * Give the queue a handle that is connected.  The queue keeps its memory in place.  Any thread may
 * do this at any time: a handle that joins after the first request takes commands from then on, and
 * its export has to be the same one (size, block sizes).  Returns 0, -1 (libnbd's failure, such as
 * that the handle is not connected), or a refusal: NBDSHIM_TOO_MANY, NBDSHIM_OTHER_EXPORT, or
 * NBDSHIM_TOO_LARGE for an export of 2^63 bytes or more.
 */
int nbdqueue_add(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s);

/*
 * The same for a file of size bytes, which begins at base in the file.  The caller owns the
 * descriptor, and keeps it open.
 */
void nbdqueue_add_file(struct nbdqueue *q, enum nbdqueue_side side, int fd, uint64_t base,
                       uint64_t size);

/* The size of an end in bytes, and its minimum block size. */
uint64_t nbdqueue_size(const struct nbdqueue *q, enum nbdqueue_side side);
uint32_t nbdqueue_minimum(const struct nbdqueue *q, enum nbdqueue_side side);

/*
 * Add a request.  Never waits.  token comes back in struct nbdqueue_done.  Returns 0 or a refusal:
 * NBDSHIM_NO_MEMORY, NBDSHIM_CLOSED if the queue was dropped, NBDSHIM_REENTERED.
 */
int nbdqueue_submit(struct nbdqueue *q, enum nbdqueue_operation operation, uintptr_t token,
                    char *buffer, uint64_t length, uint64_t offset, uint32_t flags);

/*
 * Wait until `min_done` requests are done, until none is left to wait for, or for so many seconds;
 * less than 0 is for ever, 0 does not sleep.  Writes at most `capacity` of those that are done to
 * `done`, and returns how many; they are told of again until nbdqueue_take.  Returns
 * NBDSHIM_STOPPED if the handler of a signal has raised an exception, NBDSHIM_CLOSED if the queue
 * was dropped, or NBDSHIM_REENTERED.  Then everything stays as it is.
 */
int nbdqueue_wait(struct nbdqueue *q, struct nbdqueue_done *done, int capacity, int min_done,
                  double timeout);

/*
 * Forget requests that nbdqueue_wait or nbdqueue_step has reported in `done`.  Those that were
 * taken before, by a signal handler or another thread, are ignored.
 */
void nbdqueue_take(struct nbdqueue *q, const struct nbdqueue_done *done, int count);

/*
 * When a byte was last sent or received on one of the connections, or moved from or to a file: in
 * seconds of the monotonic clock.  0 if that has not happened yet.
 */
double nbdqueue_last_moved(const struct nbdqueue *q);

/*
 * For an event loop: a descriptor that can be read, as poll says, when nbdqueue_step has something
 * to do.  It is always the same one, and the queue closes it when it is freed.  From then on also
 * handles without a command in flight are moved, so that the end of a connection is noticed.
 * Returns -1 with errno if there is none, or as nbdqueue_wait.
 */
int nbdqueue_fd(struct nbdqueue *q);

/* The same as nbdqueue_wait, but it never sleeps, and works for a millisecond at the most. */
int nbdqueue_step(struct nbdqueue *q, struct nbdqueue_done *done, int capacity);

/*
 * Send no more commands for the requests with this token.  When those in flight have ended, the
 * request is done, with ECANCELED.  One whose commands were all sent goes on.
 */
void nbdqueue_cancel(struct nbdqueue *q, uintptr_t token);

/* End the wait of another thread, or the next one. */
void nbdqueue_wake(struct nbdqueue *q);

/* The errno with which the connection of one of the handles has ended; 0 if it has not. */
int nbdqueue_error(const struct nbdqueue *q, const struct nbdshim *s);

/* How many requests were not taken yet. */
unsigned nbdqueue_length(struct nbdqueue *q);

/* How many bytes were copied, or were set to zero, in all requests for that. */
uint64_t nbdqueue_copied(struct nbdqueue *q);
uint64_t nbdqueue_zeroed(struct nbdqueue *q);

/* Forget all requests.  Commands in flight become orphans.  Does not wait for the server. */
void nbdqueue_drop(struct nbdqueue *q);

/* Whether a command of the request with this token may still use its buffer after the drop. */
bool nbdqueue_uses(struct nbdqueue *q, uintptr_t token);

/* Drop the queue, and free it when no command is in flight any more.  q may be NULL. */
void nbdqueue_destroy(struct nbdqueue *q);

#endif
