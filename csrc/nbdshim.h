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
 * why.
 *
 * Callbacks.  A callback is passed as a token, any number but 0, which comes back as the first
 * argument of the upcalls.  From the call on the shim owns the token: it says that it will not use
 * it again by exactly one upcall `release`, also when the call fails or is refused.  One exception
 * saves a crossing: a completion callback that returned 1 has released its own token.
 * An optional callback is followed by a bool: false means that there is nothing to call, and the
 * token only wants to know when the command retires.  Token 0 with false is no callback at all.
 *
 * Buffers.  The caller keeps a buffer in place until the command's last token is released.  A
 * refused read fills its buffer with zeroes, as libnbd does before any failure of its own.  What a
 * call that waits reads into, and a buffer that is stale, hold bytes that nobody may see: they are
 * cleared also where libnbd is told not to.
 *
 * Parts of a buffer go up as offsets in it.
 *
 * Errnos.  A callback's errno goes up by value, and its address as a number, for changing it.
 *
 * Calls from inside an upcall, `release` included, on its own handle are refused: libnbd holds its
 * lock there.  The few that take no lock are refused inside debug callbacks alone, which every call
 * calls.
 *
 * Threads.  Every function may be called from any thread.  nbdshim_close may run while other
 * threads are inside calls: it ends the connection, so that they come back, and the last one to
 * leave ends the libnbd handle.  A call that is still connecting comes back by itself.
 *
 * Fork.  A child's nbdshim_close closes its copy of the socket, and the connection goes on for the
 * parent.  If calls of the parent were running at the fork it only marks the handle as closed.
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

/* Copy the functions to call upwards, once for the process, before any other call. */
void nbdshim_register(const struct nbdshim_upcalls *upcalls);

/*
 * The process ends in this thread: from now on there are no upcalls in others, where a callback
 * counts as one that returned -1, and a token is not said to be released.
 */
void nbdshim_end_other_threads(void);

/* A new handle, to be ended by nbdshim_destroy; NULL if there is no memory. */
struct nbdshim *nbdshim_create(void);

/* Close the libnbd handle and release its tokens: 0, NBDSHIM_CLOSED or NBDSHIM_REENTERED. */
int nbdshim_close(struct nbdshim *s);

/* Close if need be, and free s.  No call on s may be running or follow.  s may be NULL. */
void nbdshim_destroy(struct nbdshim *s);

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

/* Whether size bytes at p are all zero, and making them so. */
bool nbdshim_is_zero(const void *p, size_t size);
void nbdshim_clear(void *p, size_t size);

/* Tell the kernel that the pages inside [p, p + size) may be huge.  Advice: failure is ignored. */
void nbdshim_advise_huge(void *p, size_t size);

#endif
