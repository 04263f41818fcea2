// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * nbdshim: libnbd as a flat ABI, for callers that can pass integers and pointers but no structs.
 *
 * This header is the manual of the ABI and declares the hand-written part of it, nbdshim_*;
 * queue.h declares nbdqueue_*.  nbdglue.h, which is generated from libnbd.h, adds
 *
 *   nbdcall_X (struct nbdshim *s, ...)   for every call nbd_X (struct nbd_handle *h, ...), and
 *   struct nbdshim_upcalls               the functions that the shim calls upwards: `release`,
 *                                        `interrupted`, `orphaned`, and one per callback type.
 *
 * Return values
 *
 * A call returns what libnbd returns.  -1 (or NULL) means that libnbd failed; nbdshim_error and
 * nbdshim_errno explain why, until this thread calls libnbd again.  The other negative values are
 * the shim's own (enum nbdshim_refusal).  NO_MEMORY, CLOSED and REENTERED mean that libnbd was not
 * called.  A call whose type has no negative numbers refuses with NULL or 0 instead, and
 * nbdshim_check returns the reason.  A null handle counts as a closed one.
 *
 * Callbacks and tokens
 *
 * The caller passes a callback as a token, any number except 0.  The token is the first argument
 * of the upcalls that the callback causes.  A refused call has not taken its tokens.  Every other
 * call has taken them, even if it fails.
 *
 * The shim holds a token until libnbd frees the callback.  It then passes the token to the upcall
 * `release` once: in the thread whose call made libnbd free it, at the end of that call, when
 * libnbd's lock is free.  One `release` receives several tokens.  If it returns anything but 0, the
 * shim tries again at once, and then whenever a later call on the handle ends; so `release` may
 * receive a token that it has already forgotten.  A completion callback that returns 1 has released
 * its own token.
 *
 * An optional callback is followed by a bool.  If that is false, libnbd calls nothing, and the
 * token only marks the moment at which the command retires.  Token 0 together with false means no
 * callback at all.
 *
 * Waiting
 *
 * A call that waits sleeps for at most a second, or until a signal arrives.  It then makes the
 * upcall `interrupted`, which runs the signal handlers; these may use the handle.  The call is
 * stopped if the upcall returns anything but 0, or when the handle's timeout expires.
 *
 * NBD cannot cancel a command, so a command whose call was stopped becomes an orphan.  Its
 * callbacks are not called any more.  Its tokens stay held and are released as those of a command
 * that does not wait.  If no token stands for its buffer, the shim makes one and passes it to the
 * upcall `orphaned` before the call returns; the upcall has to keep the buffer alive until that
 * token is released.  A later command that overlaps an orphan which changes the disk waits until
 * the orphan has retired.  The number of orphans of a handle is limited; at the limit, commands
 * wait.
 *
 * A connect or an option that was stopped continues during the next call that waits.
 *
 * Buffers
 *
 * The caller keeps a buffer alive and in place until the last token of its command is released.
 * libnbd does not touch the bytes that a failed read did not receive.  Therefore a call that waits
 * and returns new memory must be given a buffer of zeroes, and the shim clears a stale buffer (enum
 * nbdshim_state), one whose old bytes nobody may see, before it reads into it.  An upcall receives
 * a part of a buffer as an offset into it.  It receives an errno as its value together with its
 * address, through which it can change it.
 *
 * Calls from inside a callback
 *
 * libnbd holds the handle's lock during a callback, so calls on the same handle are refused.  The
 * few calls that take no lock are refused only inside debug callbacks: every call of libnbd makes
 * debug callbacks, so they would recurse without end.
 *
 * Threads
 *
 * Any thread may call any function.  nbdshim_close may run while other threads are inside calls: it
 * shuts the connection down, so that those calls return, and the last of them to leave closes
 * libnbd's handle.
 *
 * Descriptors
 *
 * A handle owns a duplicate of its connection's socket.  nbdshim_close shuts down the duplicate and
 * not libnbd's own descriptor, whose number may belong to an unrelated file by then.  The duplicate
 * is closed when the connection has died, and in any case before libnbd's handle is.
 *
 * Fork
 *
 * In a forked child, nbdshim_close closes the child's copy of the socket; the parent keeps its
 * connection.  If other threads of the parent were inside calls at the time of the fork, it only
 * marks the handle as closed.  A child that was forked inside a callback loses its copy of the
 * connection when the callback returns, because libnbd would otherwise continue with the connection
 * in both processes.
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
    NBDSHIM_NO_MEMORY = -2,       /* the shim could not allocate */
    NBDSHIM_CLOSED = -3,          /* the handle is closed */
    NBDSHIM_REENTERED = -4,       /* inside a callback of this handle: libnbd would deadlock */
    NBDSHIM_TOO_LARGE = -5,       /* a 64-bit number of the server is negative in libnbd's result */
    NBDSHIM_STOPPED = -6,         /* a signal handler raised an exception while the call waited */
    NBDSHIM_TIMED_OUT = -7,       /* the handle's timeout expired */
    NBDSHIM_SERVER_CLOSED = -8,   /* the server closed the connection during the connect */
    NBDSHIM_OTHER_EXPORT = -9,    /* the handle's export differs from that of the queue */
    NBDSHIM_TOO_MANY = -10,       /* the queue has NBDQUEUE_MAX_HANDLES already */
    NBDSHIM_OPTION_FAILED = -1000 /* minus the server's errno for an option */
};

/*
 * The upcall `completion` returns this if a signal handler raised before it could do anything.  The
 * shim then calls it again, at most twice.
 */
enum { NBDSHIM_NOT_DONE = -0x7fffffff };

/* The state of a buffer's bytes.  A buffer may start as stale; once clean, it stays clean. */
enum nbdshim_state {
    NBDSHIM_CLEAN = 0, /* its owner's bytes, or zeroes */
    NBDSHIM_STALE = 1, /* old bytes that nobody may see */
    NBDSHIM_BUSY = 2   /* a thread is overwriting the stale bytes */
};

/* Set the upcalls; the struct is copied.  Call this once per process, before anything else. */
void nbdshim_register(const struct nbdshim_upcalls *upcalls);

/*
 * Record the owner of the upcalls.  Returns the owner that was recorded first in this process: a
 * program that loads its side of the ABI a second time finds the first one.
 */
void *nbdshim_adopt(void *owner);

/* Return the next token, a number that was never returned before; in any thread. */
uint64_t nbdshim_next_token(void);

/*
 * Announce that this thread ends the process.  Other threads make no upcalls from now on: a
 * callback there counts as one that returned -1, and no tokens are released.
 */
void nbdshim_end_other_threads(void);

/* Make no upcalls in any thread from now on. */
void nbdshim_end_upcalls(void);

/* The version of GnuTLS that libnbd uses, a static string; NULL if libnbd was built without. */
const char *nbdshim_gnutls(void);

/* Create a handle; nbdshim_destroy frees it.  Returns NULL if out of memory. */
struct nbdshim *nbdshim_create(void);

/*
 * Close libnbd's handle and release its tokens.  Returns 0, NBDSHIM_CLOSED or NBDSHIM_REENTERED.
 * The memory of s stays valid, and later calls on it are refused.
 */
int nbdshim_close(struct nbdshim *s);

/*
 * Close s, if it is open, and free it.  Nobody may use s afterwards.  The memory leaks if a call on
 * s is still running, in a thread that the end of the process has stopped.  s may be NULL.
 */
void nbdshim_destroy(struct nbdshim *s);

/* Whether the shim holds a token: a call on s has taken it, and it was not released yet. */
bool nbdshim_holds(struct nbdshim *s, uintptr_t token);

/*
 * Why a call on s would be refused now: NBDSHIM_CLOSED, NBDSHIM_REENTERED, or 0 if it would not be.
 * The second function answers for the few calls that take no lock.
 */
int nbdshim_check(struct nbdshim *s);
int nbdshim_check_unlocked(struct nbdshim *s);

/*
 * The timeout of calls on s in seconds; 0, the default, means no timeout.  nbdshim_set_timeout
 * returns 0, nbdshim_timeout the seconds; both return NBDSHIM_CLOSED if s is closed.
 */
int nbdshim_set_timeout(struct nbdshim *s, double seconds);
double nbdshim_timeout(struct nbdshim *s);

/* The number of orphans of s: commands that were stopped and that have not retired yet. */
unsigned nbdshim_orphans(struct nbdshim *s);

/* This thread's last libnbd error: its text (owned by libnbd, or NULL), and its errno or 0. */
const char *nbdshim_error(void);
int nbdshim_errno(void);

/* Free a char * that a call returned; p may be NULL. */
void nbdshim_free(void *p);

/*
 * Write a socket address for nbdcall_aio_connect into addr, a buffer of capacity bytes.  Returns
 * the length of the address, or 0 if it does not fit.  An IP address is its bytes in network order;
 * port, flow and scope are numbers in host order.  A path of length bytes may start with NUL
 * (Linux's abstract sockets).
 */
uint32_t nbdshim_address_unix(void *addr, uint32_t capacity, const char *path, size_t length);
uint32_t nbdshim_address_inet(void *addr, uint32_t capacity, const char *ip, uint16_t port);
uint32_t nbdshim_address_inet6(void *addr, uint32_t capacity, const char *ip, uint16_t port,
                               uint32_t flow, uint32_t scope);

/* Whether size bytes at p are all zero. */
bool nbdshim_is_zero(const void *p, size_t size);

/*
 * Let the file system or the device of a descriptor zero a range of bytes, without changing the
 * size of a file.  Returns whether it did; otherwise zeroes have to be written.
 */
bool nbdshim_zero_range(int fd, uint64_t at, uint64_t length);

/*
 * Find the run at the start of size bytes at p, which are more than 0: blocks that all have only
 * zeroes in them, or that all have data.  offset is that of p on the disk, where blocks begin at
 * the multiples of `block`.  Returns the number of its bytes, negative if they are zeroes.
 */
int64_t nbdshim_run(const void *p, size_t size, uint64_t offset, uint32_t block);

/*
 * Fill size bytes at p with zeroes if *state says that they are stale, before anybody reads them.
 * If another thread is overwriting them, wait for it.  Returns 0, or -1 if that takes longer than a
 * second.
 */
int nbdshim_clear_stale(int *state, void *p, size_t size);

/* Fill size bytes at p with zeroes. */
void nbdshim_clear(void *p, size_t size);

/* Advise the kernel to use huge pages inside [p, p + size).  Failure is ignored. */
void nbdshim_advise_huge(void *p, size_t size);

#endif
