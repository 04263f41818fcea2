// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * nbdqueue: many commands in flight on one or several handles, without an upcall for each of them.
 *
 * Requests.  nbdqueue_submit adds a request.  The queue cuts it into pieces: commands that are as
 * large as the queue's piece size and the server's block size constraints allow.  At most `depth`
 * commands are in flight at a time, in the order of the requests; the server may answer them in any
 * order.  When all pieces of a request have ended, the request is done, and nbdqueue_wait reports
 * it with the error of the piece that failed first.  After an error the queue sends no more pieces
 * of that request.
 *
 * Sides.  A queue has a target, and for NBDQUEUE_COPY also a source.  Every request goes to the
 * target, except the read half of a copy, which goes to the source.  The endpoint of a side is
 * one file, or one or several handles of the same export; or, for a target, nothing: what is
 * written there is discarded.
 *
 * Zeroes.  After nbdqueue_set_sparse, a copy examines the data that it has read: it zeroes the
 * blocks that have only zeroes in them, and writes the others.  If the target is known to read as
 * zeroes, nothing is sent for zeroes.
 *
 * Alignment.  If the target has a minimum block size, the queue widens an unaligned read.  It does
 * an unaligned write by reading the blocks, merging the data and writing them back, and it changes
 * nothing else in these blocks meanwhile.  It merges the edges of a zero in the same way, and
 * leaves out the edges of a trim.  A copy has to be aligned to both endpoints, except that it may
 * end where an endpoint ends.  The last block of an export is as short as the export.  Where the
 * server has no zero command, the queue writes zeroes.
 *
 * Lost connections.  After nbdqueue_set_reconnect, the loss of a side's connection fails no
 * request. Its commands are sent again on another connection of the side; if there is none, they
 * wait until nbdqueue_add gives one, or nbdqueue_give_up ends the wait.  A server that was killed
 * may have lost what it had not flushed.  So the queue keeps a journal of the changes of the target
 * since the last flush.  When a connection was lost, and when one joins, it waits until no command
 * to the target is in flight, makes these changes again in their order, and then continues.  When
 * the journal is full, the queue flushes before it sends the next change.  A server without flush
 * has no journal.
 *
 * Buffers.  The caller keeps a buffer alive and in place until its request was reported.  When a
 * queue is dropped, the commands in flight become orphans (see wait.h), and the token of the queue
 * is passed to the upcall `release` as soon as no command can use any of the buffers.
 *
 * Order.  The queue does not order commands, with one exception.  A write, zero or trim that was
 * cancelled, or whose caller was stopped, may still happen; so the queue holds back a command that
 * overlaps it until it has ended.
 *
 * NULL stands for a queue that was destroyed; calls are refused as on a dropped queue.
 *
 * Threads.  Any thread may call any function, except nbdqueue_destroy.  One thread at a time has
 * the queue's turn and moves the connections; it lets waiting calls on one of the handles go first.
 *
 * Fork.  In a forked child, a queue of the parent refuses calls as a dropped queue does, because a
 * thread of the parent may have been in the middle of changing it.  Dropping it closes the child's
 * copies of its descriptors.  The buffers of its requests stay alive until the child ends.
 */
#ifndef NBDSHIM_QUEUE_H
#define NBDSHIM_QUEUE_H

#include "nbdshim.h"

/* The largest number of handles of a queue, both sides together. */
enum { NBDQUEUE_MAX_HANDLES = 64 };

enum nbdqueue_side { NBDQUEUE_TARGET, NBDQUEUE_SOURCE };

enum nbdqueue_operation {
    NBDQUEUE_READ,
    NBDQUEUE_WRITE,
    NBDQUEUE_ZERO,
    NBDQUEUE_TRIM,
    NBDQUEUE_CACHE,
    NBDQUEUE_FLUSH,
    NBDQUEUE_COPY /* read from the source and write to the target */
};

/* A request that is done. */
struct nbdqueue_done {
    uintptr_t token;
    uint64_t serial; /* identifies the request; nbdqueue_take needs it */
    uint64_t offset; /* the start of the piece that failed first, */
    uint64_t length; /* and its size in bytes, without the widening for alignment */
    uint64_t moved;  /* how many bytes were copied or set to zero; */
    uint64_t zeroed; /* of these, how many became zeroes */
    int error;       /* its errno, or 0 if no piece failed */
    int side;        /* enum nbdqueue_side: the side that failed, */
    int command;     /* and the enum nbdqueue_operation of its command */
};

struct nbdqueue;

/*
 * Create a queue; nbdqueue_destroy frees it.  Returns NULL with errno if out of memory or
 * descriptors.  depth is the largest number of commands in flight, piece the largest size of one in
 * bytes.  token stands for the buffers of all requests: it is released when no command can use
 * them.
 */
struct nbdqueue *nbdqueue_create(unsigned depth, uint32_t piece, uintptr_t token);

/*
 * Create a queue, and store it in *made before returning: a caller that a signal handler interrupts
 * before it has the result still finds the queue.  Returns 0 or an errno.
 */
int nbdqueue_make(struct nbdqueue **made, unsigned depth, uint32_t piece, uintptr_t token);

/*
 * Add a connected handle to a side.  The queue holds a reference to s.  Any thread may do this at
 * any time.  A handle that is added after the first request takes part from then on, and its export
 * must match that of the others in size and block sizes.  After nbdqueue_set_reconnect, it takes
 * the place of one that was lost, if there is one.  Returns 0; -1 if libnbd fails, for
 * example because the handle is not connected; or a refusal: NBDSHIM_TOO_MANY,
 * NBDSHIM_OTHER_EXPORT, or NBDSHIM_TOO_LARGE for an export of 2^63 bytes or more.
 */
int nbdqueue_add(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s);

/*
 * Make size bytes of a file, from the offset base on, the endpoint of a side.  The caller owns the
 * descriptor and keeps it open.
 */
void nbdqueue_add_file(struct nbdqueue *q, enum nbdqueue_side side, int fd, uint64_t base,
                       uint64_t size);

/* Discard what is written to the target, which takes size bytes. */
void nbdqueue_add_null(struct nbdqueue *q, uint64_t size);

/*
 * Have copies find zeroes, in blocks of `block` bytes, or of the target's minimum block size if
 * that is larger; 0 is off, as it is at first.  The blocks begin at multiples of their size; those
 * at the ends of a piece may be shorter.  With target_is_zero, nothing is sent for zeroes that were
 * found, or for NBDQUEUE_ZERO.  To be called before the first request.
 */
void nbdqueue_set_sparse(struct nbdqueue *q, uint32_t block, bool target_is_zero);

/*
 * Let the connections of a side be replaced when they are lost.  For the target, `bound` is the
 * size of the journal in bytes: of the data of writes, which the queue copies, and of what copies
 * have written, which they read again from the source.  To be called before the first request.
 * Returns 0 or NBDSHIM_NO_MEMORY.
 */
int nbdqueue_set_reconnect(struct nbdqueue *q, enum nbdqueue_side side, uint64_t bound);

/*
 * How many connections of the sides with nbdqueue_set_reconnect were lost so far.  Each loss makes
 * nbdqueue_wait return, as nbdqueue_wake does, and nbdqueue_error tells which handle was lost.
 */
unsigned nbdqueue_losses(const struct nbdqueue *q);

/*
 * How many commands of a side a server has answered so far, with or without an error.  Changes that
 * were made again do not count.
 */
uint64_t nbdqueue_answers(const struct nbdqueue *q, enum nbdqueue_side side);

/*
 * Stop waiting for a side that has lost its connections: from now on, all its commands fail with
 * this errno.
 */
void nbdqueue_give_up(struct nbdqueue *q, enum nbdqueue_side side, int error);

/* The size of a side's endpoint, and its minimum block size, both in bytes. */
uint64_t nbdqueue_size(const struct nbdqueue *q, enum nbdqueue_side side);
uint32_t nbdqueue_minimum(const struct nbdqueue *q, enum nbdqueue_side side);

/*
 * Add a request, without waiting.  struct nbdqueue_done repeats its token.  length and offset are
 * in bytes; flags are libnbd's.  Returns 0 or a refusal: NBDSHIM_NO_MEMORY, NBDSHIM_REENTERED, or
 * NBDSHIM_CLOSED if the queue was dropped.
 */
int nbdqueue_submit(struct nbdqueue *q, enum nbdqueue_operation operation, uintptr_t token,
                    char *buffer, uint64_t length, uint64_t offset, uint32_t flags);

/*
 * Wait until min_done requests are done, all requests are done, or the timeout expires.  A timeout
 * below 0 never expires; with 0 the call does not sleep.  Reports at most `capacity` of the
 * requests that are done in `done`, and returns how many; the same ones are reported again until
 * nbdqueue_take.  Returns NBDSHIM_STOPPED if a signal handler has raised, NBDSHIM_CLOSED if the
 * queue was dropped, or NBDSHIM_REENTERED; all requests are unaffected then.
 */
int nbdqueue_wait(struct nbdqueue *q, struct nbdqueue_done *done, int capacity, int min_done,
                  double timeout);

/*
 * Remove requests that nbdqueue_wait or nbdqueue_step has reported.  Those that a signal handler or
 * another thread has taken before are ignored.
 */
void nbdqueue_take(struct nbdqueue *q, const struct nbdqueue_done *done, int count);

/*
 * The time at which a byte was last sent or received on a connection, or read from or written to a
 * file, in seconds of the monotonic clock; 0 if none was yet.
 */
double nbdqueue_last_moved(const struct nbdqueue *q);

/*
 * Return a descriptor for an event loop.  It is readable when nbdqueue_step has something to do,
 * and does not change.  The queue owns it.  From the first call on, the queue also moves handles
 * that have no command in flight, so that it notices the end of a connection.  Returns -1 with
 * errno if out of descriptors or memory, or a refusal as nbdqueue_wait does.
 */
int nbdqueue_fd(struct nbdqueue *q);

/*
 * Move the queue without sleeping, for at most about a millisecond.  Reports as nbdqueue_wait does;
 * returns 0 if another thread has the turn.
 */
int nbdqueue_step(struct nbdqueue *q, struct nbdqueue_done *done, int capacity);

/*
 * Send no more commands for the requests with this token.  Such a request is done, with ECANCELED,
 * when its commands in flight have ended.  A request whose commands were all sent is not cancelled.
 */
void nbdqueue_cancel(struct nbdqueue *q, uintptr_t token);

/* Make nbdqueue_wait return: the call that runs in another thread, or else the next one. */
void nbdqueue_wake(struct nbdqueue *q);

/* The errno with which the connection of handle s has ended; 0 if it has not. */
int nbdqueue_error(const struct nbdqueue *q, const struct nbdshim *s);

/* The number of requests that were not taken yet. */
unsigned nbdqueue_length(struct nbdqueue *q);

/*
 * How many bytes copies have moved as data, and how many became zeroes, by copies and by
 * NBDQUEUE_ZERO; how many copies have read from the source; and how many copies and NBDQUEUE_ZERO
 * have written to the target as data.
 */
uint64_t nbdqueue_copied(struct nbdqueue *q);
uint64_t nbdqueue_zeroed(struct nbdqueue *q);
uint64_t nbdqueue_read(struct nbdqueue *q);
uint64_t nbdqueue_written(struct nbdqueue *q);

/*
 * Drop all requests, without waiting for the server.  Commands in flight become orphans.  Waits for
 * the thread that has the turn, which gives it back at once.
 */
void nbdqueue_drop(struct nbdqueue *q);

/* Whether a command may still use the buffer of the request with this token, after a drop. */
bool nbdqueue_uses(struct nbdqueue *q, uintptr_t token);

/* Drop the queue, and free it as soon as no command is in flight.  q may be NULL. */
void nbdqueue_destroy(struct nbdqueue *q);

#endif
