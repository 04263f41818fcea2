// SPDX-License-Identifier: LGPL-2.0-or-later
/* The part of the shim that does not depend on which calls libnbd.h has; see nbdshim.h. */

#include "nbdshim.h"
#include "handle.h"
#include "nbdglue.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct nbdshim_upcalls nbdshim_up;
_Thread_local struct nbdshim_upcall *nbdshim_innermost;
atomic_bool nbdshim_is_ending;
_Thread_local bool nbdshim_ends_here;

void nbdshim_register(const struct nbdshim_upcalls *upcalls)
{
    nbdshim_up = *upcalls;
}

void nbdshim_end_other_threads(void)
{
    nbdshim_ends_here = true;
    atomic_store(&nbdshim_is_ending, true);
}

struct nbdshim *nbdshim_create(void)
{
    struct nbdshim *s = malloc(sizeof *s);

    if (s == NULL)
        return NULL;
    s->h = nbd_create();
    if (s->h == NULL) {
        free(s);
        return NULL;
    }
    atomic_init(&s->users, 1);
    atomic_init(&s->socket, -1);
    atomic_init(&s->owner, 0);
#ifdef LIBNBD_HAVE_NBD_SET_PREAD_INITIALIZE
    atomic_init(&s->leaves_old, false);
#else
    atomic_init(&s->leaves_old, true);
#endif
    return s;
}

void nbdshim_leave(struct nbdshim *s)
{
    struct nbd_handle *h = s->h;

    /* Once the count is down another thread may free s, so s is not touched after that. */
    if (atomic_fetch_sub_explicit(&s->users, 1, memory_order_acq_rel) == (NBDSHIM_CLOSING | 1))
        nbd_close(h);
}

void nbdshim_note_socket(struct nbdshim *s)
{
    atomic_store_explicit(&s->owner, getpid(), memory_order_relaxed);
    atomic_store_explicit(&s->socket, nbd_aio_get_fd(s->h), memory_order_relaxed);
}

/* Let the calls that wait in other threads see the end of the connection. */
static void wake(struct nbdshim *s)
{
    int socket = atomic_load_explicit(&s->socket, memory_order_relaxed);

    /* After a fork the threads are the parent's, and so is the connection. */
    if (getpid() != atomic_load_explicit(&s->owner, memory_order_relaxed))
        return;
    /* A dead or closed handle has given its socket back, and waits for nothing. */
    if (socket >= 0 && !nbd_aio_is_dead(s->h) && !nbd_aio_is_closed(s->h))
        (void)shutdown(socket, SHUT_RDWR);
}

int nbdshim_close(struct nbdshim *s)
{
    unsigned users;

    if (nbdshim_is_reentry(s))
        return NBDSHIM_REENTERED;
    users = atomic_fetch_or_explicit(&s->users, NBDSHIM_CLOSING, memory_order_acq_rel);
    if (users & NBDSHIM_CLOSING)
        return NBDSHIM_CLOSED;
    if (users > 1)
        wake(s);
    nbdshim_leave(s);
    return 0;
}

void nbdshim_destroy(struct nbdshim *s)
{
    if (s == NULL)
        return;
    nbdshim_close(s);
    free(s);
}

static int check_closed(struct nbdshim *s)
{
    return (atomic_load(&s->users) & NBDSHIM_CLOSING) != 0 ? NBDSHIM_CLOSED : 0;
}

int nbdshim_check(struct nbdshim *s)
{
    return nbdshim_is_reentry(s) ? NBDSHIM_REENTERED : check_closed(s);
}

int nbdshim_check_unlocked(struct nbdshim *s)
{
    return nbdshim_is_debugging(s) ? NBDSHIM_REENTERED : check_closed(s);
}

const char *nbdshim_error(void)
{
    return nbd_get_error();
}

int nbdshim_errno(void)
{
    return nbd_get_errno();
}

int64_t nbdshim_number(int64_t number, const char *call)
{
    const char *error;
    size_t length = strlen(call);

    if (number >= 0)
        return number;
    error = number == -1 ? nbd_get_error() : NULL;
    if (error != NULL && strncmp(error, call, length) == 0 && error[length] == ':')
        return -1;
    return NBDSHIM_TOO_LARGE;
}

void nbdshim_free(void *p)
{
    free(p);
}

int nbdshim_closure_new(struct nbdshim *s, uintptr_t token, const void *buffer,
                        struct nbdshim_closure **closure)
{
    *closure = NULL;
    if (token == 0)
        return 0;
    *closure = malloc(sizeof **closure);
    if (*closure == NULL) {
        nbdshim_release(token);
        return NBDSHIM_NO_MEMORY;
    }
    **closure = (struct nbdshim_closure){.s = s, .token = token, .buffer = buffer};
    return 0;
}

void nbdshim_closure_free(void *closure)
{
    struct nbdshim_closure *c = closure;
    struct nbdshim_upcall upcall;

    if (c == NULL)
        return;
    nbdshim_call_up(&upcall, c->s, false);
    if (!c->released)
        nbdshim_release(c->token);
    nbdshim_came_back(&upcall);
    free(c);
}

void nbdshim_closure_drop(struct nbdshim_closure *closure)
{
    if (closure == NULL)
        return;
    nbdshim_release(closure->token);
    free(closure);
}

void nbdshim_release(uintptr_t token)
{
    if (token != 0 && !nbdshim_is_silent())
        nbdshim_up.release(token);
}

uint32_t nbdshim_address_unix(void *addr, uint32_t room, const char *path, size_t length)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    /* A path has a NUL behind it, which counts; an abstract name has one before it. */
    size_t nul = length == 0 || path[0] != '\0';
    size_t size = offsetof(struct sockaddr_un, sun_path) + length + nul;

    if (length > sizeof sun.sun_path - nul || sizeof sun > room)
        return 0;
    memcpy(sun.sun_path, path, length);
    memcpy(addr, &sun, size);
    return (uint32_t)size;
}

uint32_t nbdshim_address_inet(void *addr, uint32_t room, const char *ip, uint16_t port)
{
    struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(port)};

    if (sizeof sin > room)
        return 0;
    memcpy(&sin.sin_addr, ip, sizeof sin.sin_addr);
    memcpy(addr, &sin, sizeof sin);
    return sizeof sin;
}

uint32_t nbdshim_address_inet6(void *addr, uint32_t room, const char *ip, uint16_t port,
                               uint32_t flow, uint32_t scope)
{
    struct sockaddr_in6 sin6 = {.sin6_family = AF_INET6,
                                .sin6_port = htons(port),
                                .sin6_flowinfo = htonl(flow),
                                .sin6_scope_id = scope};

    if (sizeof sin6 > room)
        return 0;
    memcpy(&sin6.sin6_addr, ip, sizeof sin6.sin6_addr);
    memcpy(addr, &sin6, sizeof sin6);
    return sizeof sin6;
}

bool nbdshim_is_zero(const void *p, size_t size)
{
    const char *bytes = p;

    return size == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, size - 1) == 0);
}

void nbdshim_clear(void *p, size_t size)
{
    memset(p, 0, size);
}

void nbdshim_advise_huge(void *p, size_t size)
{
#ifdef MADV_HUGEPAGE
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)p + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)p + size) & ~(page - 1);

    if (first < end)
        (void)madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)p;
    (void)size;
#endif
}
