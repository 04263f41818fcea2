// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * nbdshim: libnbd as a flat ABI, for callers that can pass integers and pointers but no structs.
 *
 * This header is what is written by hand: nbdshim_*.  nbdglue.h, generated from libnbd.h, adds
 *
 *   nbdcall_X (struct nbdshim *s, ...)   for every call nbd_X (struct nbd_handle *h, ...), and
 *   struct nbdshim_upcalls               what is called upwards, one for every callback type.
 *
 * Return values.  A call returns what libnbd returns.  -1 (or NULL) is libnbd's failure:
 * nbdshim_error and nbdshim_errno explain it until this thread's next call of libnbd.  The other
 * negative values are the shim's own (enum nbdshim_refusal).  With the first three, libnbd was not
 * called.  A call whose type has no negative numbers refuses with NULL or 0, and
 * nbdshim_check tells why.  A null pointer is taken for a closed handle.
 *
 * Callbacks.  A callback is passed as a token: any number but 0.  It comes back as the first
 * argument of the upcalls.  A call that is refused has not taken its tokens.  Any other call has,
 * also if it fails.  The shim holds a token until libnbd frees the callback.  Then it hands the
 * token over, once, by the upcall `release`: in the thread whose call freed it, when that call
 * ends and libnbd's lock is free.  One upcall hands over many tokens.  If `release` returns
 * something else than 0, they are handed over again, at once and when later calls on the handle
 * end: so `release` may be given a token that it no longer knows.  A completion callback that
 * returns 1 has released its own token.  An optional callback is followed by a bool.  If it is
 * false there is nothing to call, and the token is only to be released when the command retires.
 * Token 0 and false is no callback at all.
 *
 * Waiting.  A call that waits sleeps for a second at the most, or until a signal arrives.  Then it
 * makes the upcall `interrupted`, in which the handlers of signals run; they may use the handle. If
 * that returns something else than 0, or if the handle's timeout is over, the call is stopped.  A
 * command that was stopped is an orphan.  Its callbacks are not called any more.  Its tokens are
 * held and released as those of a command that does not wait.  If none stands for its buffer, the
 * shim makes one: before the call returns, the upcall `orphaned` is given it, and has to keep the
 * buffer in place.  A connect or an option that was stopped goes on when the next call waits.  A
 * command that overlaps an orphan which changes the disk waits for that one's end.  A handle has a
 * bounded number of orphans: then commands wait for room.
 *
 * Buffers.  The caller keeps a buffer in place until the last token of the command is released.
 * Where a read fails, bytes of its buffer stay as they were.  So a call that waits and makes its
 * result is given a buffer of zeroes; and a stale buffer (enum nbdshim_state), which has bytes that
 * nobody may see, is cleared first.  A part of a buffer goes up as an offset in it.  An errno goes
 * up by value, together with its address, for changing it.
 *
 * Calls from inside a callback.  On its own handle they are refused, because libnbd holds its
 * lock.  The few calls that take no lock are refused inside debug callbacks only, because every
 * call makes debug callbacks.
 *
 * Threads.  Every function may be called from any thread.  nbdshim_close may run while other
 * threads are inside calls: it ends the connection, so that they come back, and the last one to
 * leave closes libnbd's handle.
 *
 * Descriptors.  A handle has a duplicate of its connection's socket.  nbdshim_close shuts the
 * duplicate down, because the number of libnbd's own socket may be a stranger's by then.  It is
 * closed when the connection has died, and before libnbd's handle.
 *
 * Fork.  In the child, nbdshim_close closes the child's copy of the socket, and the parent keeps
 * the connection.  If calls of the parent were running at the fork, it only marks the handle as
 * closed.  A child that was forked in a callback loses its copy of the connection when the
 * callback returns: else it would go on with the connection, as the parent does.
 */
#ifndef NBDSHIM_H
#define NBDSHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct nbdshim;
struct nbdshim_upcalls;

enum nbdshim_refusal {
    NBDSHIM_NO_MEMORY = -2, /* the shim could not allocate */
    NBDSHIM_CLOSED = -3,    /* the handle is closed */
    NBDSHIM_REENTERED = -4, /* inside a callback of this handle: libnbd would deadlock */
    NBDSHIM_TOO_LARGE = -5, /* libnbd's 64-bit result, a server's number, was below -1 */
    NBDSHIM_STOPPED = -6,   /* a signal handler raised an exception while the call was waiting */
    NBDSHIM_TIMED_OUT = -7, /* the handle's timeout is over */
    NBDSHIM_SERVER_CLOSED = -8,   /* the server has ended the connection that was being made */
    NBDSHIM_OTHER_EXPORT = -9,    /* the handle's export is not the one that a queue works on */
    NBDSHIM_TOO_MANY = -10,       /* the queue has as many handles as it can */
    NBDSHIM_OPTION_FAILED = -1000 /* and less: the server's errno for an option is subtracted */
};

/*
 * What the upcall `completion` returns if a signal handler's exception kept it from doing anything.
 * It is called again, twice at the most.
 */
enum { NBDSHIM_NOT_DONE = -0x7fffffff };

/* What the bytes of a buffer are.  A buffer may begin as stale; once it is clean, it stays clean.
 */
enum nbdshim_state {
    NBDSHIM_CLEAN = 0, /* its owner's bytes, or zeroes */
    NBDSHIM_STALE = 1, /* bytes that nobody may see */
    NBDSHIM_BUSY = 2   /* stale ones that a thread is overwriting */
};

/* Copy the functions to call upwards, once for the process, before any other call. */
void nbdshim_register(const struct nbdshim_upcalls *upcalls);

/*
 * Remember the owner of the upcalls.  Returns the owner that was given first in this process, for a
 * program that loads the shim a second time.
 */
void *nbdshim_adopt(void *owner);

/*
 * The process ends in this thread.  From now on there are no upcalls in other threads: a callback
 * there counts as one that returned -1, and tokens are not handed over.
 */
void nbdshim_end_other_threads(void);

/* From now on there are no upcalls in any thread. */
void nbdshim_end_upcalls(void);

/* The version of the GnuTLS that libnbd uses, NULL if it is built without; it lives for ever. */
const char *nbdshim_gnutls(void);

/* A new handle, to be ended by nbdshim_destroy; NULL if there is no memory. */
struct nbdshim *nbdshim_create(void);

/*
 * Close the libnbd handle and release its tokens: 0, NBDSHIM_CLOSED or NBDSHIM_REENTERED.  The
 * memory of s stays: later calls are refused.
 */
int nbdshim_close(struct nbdshim *s);

/*
 * Close s, if it is open, and free it: nobody may use it any more.  The memory is not freed if a
 * call on s is still running, in a thread that the end of the process has stopped.  s may be NULL.
 */
void nbdshim_destroy(struct nbdshim *s);

/*
 * Whether the shim holds a token: a call on s has taken it, and it was not yet handed over by
 * `release`.
 */
bool nbdshim_holds(struct nbdshim *s, uintptr_t token);

/*
 * Why a call on s would be refused now: 0 (it would not), NBDSHIM_CLOSED or NBDSHIM_REENTERED.  The
 * second function is for the few calls that take no lock: only debug callbacks may not make them.
 */
int nbdshim_check(struct nbdshim *s);
int nbdshim_check_unlocked(struct nbdshim *s);

/*
 * How many seconds a call on s may wait; 0 is for ever, as at the beginning.  The first function
 * returns 0, the second the number; both return NBDSHIM_CLOSED if s is closed.
 */
int nbdshim_set_timeout(struct nbdshim *s, double seconds);
double nbdshim_timeout(struct nbdshim *s);

/* How many orphans s has: commands that were stopped, and that the server has not answered. */
unsigned nbdshim_orphans(struct nbdshim *s);

/* This thread's last libnbd error: its text (libnbd's, may be NULL) and its errno (may be 0). */
const char *nbdshim_error(void);
int nbdshim_errno(void);

/* Free a char * that a call returned. */
void nbdshim_free(void *p);

/*
 * Write a socket address for nbdcall_aio_connect into addr, which has room for capacity bytes, and
 * return its length; 0 if it does not fit.  Paths and IP addresses are bytes (network order), port
 * and scope numbers in host order.  A path may begin with NUL (Linux's abstract sockets).
 */
uint32_t nbdshim_address_unix(void *addr, uint32_t capacity, const char *path, size_t length);
uint32_t nbdshim_address_inet(void *addr, uint32_t capacity, const char *ip, uint16_t port);
uint32_t nbdshim_address_inet6(void *addr, uint32_t capacity, const char *ip, uint16_t port,
                               uint32_t flow, uint32_t scope);

/* Whether size bytes at p are all zero. */
bool nbdshim_is_zero(const void *p, size_t size);

/*
 * Fill size bytes at p with zeroes if *state says that they are stale, before anybody looks at
 * them. Waits for another thread that is overwriting them.  Returns 0, or -1 if that takes longer
 * than a second.
 */
int nbdshim_clear_stale(int *state, void *p, size_t size);

/* Fill size bytes at p with zeroes. */
void nbdshim_clear(void *p, size_t size);

/* Tell the kernel that the pages inside [p, p + size) may be huge.  Advice: failure is ignored. */
void nbdshim_advise_huge(void *p, size_t size);

#endif
