// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * nbdshim: libnbd as a flat ABI, for callers that can pass integers and pointers but no structs.
 *
 * This header is what is written by hand: nbdshim_*.  nbdglue.h, generated from libnbd.h, adds
 *
 *   nbdcall_X (struct nbdshim *s, ...)   for every call nbd_X (struct nbd_handle *h, ...), and
 *   struct nbdshim_upcalls               what is called upwards, one for every callback type.
 *
 * Return values.  A call returns what libnbd returns.  -1 (or NULL) is libnbd's failure, explained
 * by nbdshim_error and nbdshim_errno until the same thread's next libnbd call.  The other negative
 * values are the shim's own (enum nbdshim_refusal): but for the last, libnbd was not called.  Calls
 * that return a pointer or an unsigned 64-bit number refuse with NULL or 0; nbdshim_check tells
 * why.  A null pointer is taken for a closed handle.
 *
 * Callbacks.  A callback is passed as a token, any number but 0, which comes back as the first
 * argument of the upcalls.  A call that is refused has not taken its tokens.  Any other call has:
 * the shim holds each token until libnbd frees the callback, also when the call fails, and then
 * hands it over, once, by the upcall `release`, in the thread whose call freed it, when that call
 * ends and libnbd's lock is free.  Many tokens are one upcall.  What `release` does not take (it
 * returns something else than 0) is handed over again, at once and when later calls on the handle
 * end: so `release` must not mind a token that it knows no more.  One exception saves a crossing: a
 * completion callback that returned 1 has released its own token.  An optional callback is followed
 * by a bool: false means that there is nothing to call, and the token only wants to know when the
 * command retires.  Token 0 with false is no callback at all.
 *
 * Buffers.  The caller keeps a buffer in place until the command's last token is released.  A
 * refused call that waits fills its buffer with zeroes, as libnbd does before any failure of its
 * own.  What a call that waits reads into, and a stale buffer (enum nbdshim_state), hold bytes that
 * nobody may see: they are cleared also where libnbd is told not to.
 *
 * Parts of a buffer go up as offsets in it.
 *
 * Errnos.  A callback's errno goes up by value, and its address as a number, for changing it.
 *
 * Calls from inside a callback on its own handle are refused: libnbd holds its lock there.  The few
 * that take no lock are refused inside debug callbacks alone, which every call calls.
 *
 * Threads.  Every function may be called from any thread.  nbdshim_close may run while other
 * threads are inside calls: it ends the connection, so that they come back, and the last one to
 * leave ends the libnbd handle.  A call that is still connecting comes back by itself.
 *
 * Descriptors.  A handle has a duplicate of its connection's socket, which is what nbdshim_close
 * shuts down: the number of libnbd's own may be a stranger's by then.  It is closed when the
 * connection has died, and before the libnbd handle.
 *
 * Fork.  A child's nbdshim_close closes its copy of the socket, and the connection goes on for the
 * parent.  If calls of the parent were running at the fork it only marks the handle as closed.  A
 * child that was forked in a callback loses its copy of the connection when the callback returns:
 * it would go on where the parent does.
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
    NBDSHIM_TOO_LARGE = -5  /* libnbd's 64-bit result, a server's number, was below -1 */
};

/*
 * What the upcall `completion` returns where it came to nothing: an exception of a signal handler
 * was raised, and kept, before anything was done.  It is called again, twice at the most.
 */
enum { NBDSHIM_NOT_DONE = -0x7fffffff };

/* What a buffer holds.  It begins as stale, if it does, and ends as clean. */
enum nbdshim_state {
    NBDSHIM_CLEAN = 0, /* its owner's bytes, or zeroes */
    NBDSHIM_STALE = 1, /* bytes that nobody may see */
    NBDSHIM_BUSY = 2   /* stale ones that a thread is overwriting */
};

/* Copy the functions to call upwards, once for the process, before any other call. */
void nbdshim_register(const struct nbdshim_upcalls *upcalls);

/*
 * Remember what the upcalls belong to, for whoever loads the shim again in this process: returns
 * the owner that was given first.
 */
void *nbdshim_adopt(void *owner);

/*
 * The process ends in this thread: from now on there are no upcalls in others, where a callback
 * counts as one that returned -1, and a token is not said to be released.
 */
void nbdshim_end_other_threads(void);

/* The same for all threads: nobody is left to call. */
void nbdshim_end_upcalls(void);

/* A new handle, to be ended by nbdshim_destroy; NULL if there is no memory. */
struct nbdshim *nbdshim_create(void);

/*
 * Close the libnbd handle and release its tokens: 0, NBDSHIM_CLOSED or NBDSHIM_REENTERED.  The
 * memory of s stays: later calls are refused.
 */
int nbdshim_close(struct nbdshim *s);

/*
 * Close if need be, and free s, which nobody may name any more.  If a call on s is running all the
 * same, in a thread that the end of the process has stopped, the memory is left.  s may be NULL.
 */
void nbdshim_destroy(struct nbdshim *s);

/*
 * Whether the shim holds a token: a call on s has taken it, and it was not yet handed over by
 * `release`.
 */
bool nbdshim_holds(struct nbdshim *s, uintptr_t token);

/*
 * Why a call on s would be refused now: 0, NBDSHIM_CLOSED or NBDSHIM_REENTERED.  The second is for
 * the few calls that take no lock: of all callbacks only those of debug may not make them.
 */
int nbdshim_check(struct nbdshim *s);
int nbdshim_check_unlocked(struct nbdshim *s);

/* This thread's last libnbd error: its text (libnbd's, may be NULL) and its errno (may be 0). */
const char *nbdshim_error(void);
int nbdshim_errno(void);

/* Free a char * that a call returned. */
void nbdshim_free(void *p);

/*
 * Write a socket address for nbdcall_aio_connect into addr, which has room for room bytes, and
 * return its length; 0 if it does not fit.  Paths and IP addresses are bytes (network order), port
 * and scope numbers in host order.  A path may begin with NUL (Linux's abstract sockets).
 */
uint32_t nbdshim_address_unix(void *addr, uint32_t room, const char *path, size_t length);
uint32_t nbdshim_address_inet(void *addr, uint32_t room, const char *ip, uint16_t port);
uint32_t nbdshim_address_inet6(void *addr, uint32_t room, const char *ip, uint16_t port,
                               uint32_t flow, uint32_t scope);

/* Whether size bytes at p are all zero. */
bool nbdshim_is_zero(const void *p, size_t size);

/*
 * Make size bytes at p zeroes if *state says that they are stale, before anybody looks at them: 0.
 * Another thread that is overwriting them is waited for; -1 if it takes longer than a second.
 */
int nbdshim_clear_stale(int *state, void *p, size_t size);

/* Tell the kernel that the pages inside [p, p + size) may be huge.  Advice: failure is ignored. */
void nbdshim_advise_huge(void *p, size_t size);

#endif
