// SPDX-License-Identifier: LGPL-2.0-or-later
/* The part of the shim that does not depend on which calls libnbd.h has; see nbdshim.h. */

#include "nbdshim.h"
#include "handle.h"
#include "nbdglue.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* So many tokens at most are handed over by one upcall. */
#define BATCH 64
/* How often nbdshim_holds tries to get the lock, and lets other threads run in between. */
#define HOLDS_TRIES 100000

struct nbdshim_upcalls nbdshim_up;
static _Atomic(void *) owner_of_upcalls;
_Thread_local struct nbdshim_upcall *nbdshim_innermost;
_Thread_local struct nbdshim_closure *nbdshim_released;
atomic_bool nbdshim_is_ending;
atomic_uint nbdshim_forks;
_Thread_local bool nbdshim_ends_here;

/* Run in the child of every fork. */
static void count_fork(void)
{
    atomic_fetch_add_explicit(&nbdshim_forks, 1, memory_order_relaxed);
}

void nbdshim_register(const struct nbdshim_upcalls *upcalls)
{
    if (nbdshim_up.release == NULL)
        (void)pthread_atfork(NULL, NULL, count_fork);
    nbdshim_up = *upcalls;
}

void *nbdshim_adopt(void *owner)
{
    void *first = NULL;

    return atomic_compare_exchange_strong(&owner_of_upcalls, &first, owner) ? owner : first;
}

void nbdshim_end_other_threads(void)
{
    nbdshim_ends_here = true;
    atomic_store(&nbdshim_is_ending, true);
}

void nbdshim_end_upcalls(void)
{
    atomic_store(&nbdshim_is_ending, true);
    nbdshim_ends_here = false;
}

void nbdshim_cut(struct nbdshim *s)
{
    int socket = atomic_load(&s->socket), waker = atomic_load(&s->waker), nothing;
    struct stat ours, its;

    /*
     * The connection may have ended, and a stranger's file may have its number by now.  The number
     * is still libnbd's if it names the same socket as the waker, which is a duplicate.
     */
    if (waker < 0 || fstat(waker, &ours) == -1 || fstat(socket, &its) == -1 ||
        ours.st_dev != its.st_dev || ours.st_ino != its.st_ino)
        return;
    nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (nothing >= 0) {
        (void)dup2(nothing, socket);
        (void)dup2(nothing, waker);
        close(nothing);
    }
}

struct nbdshim *nbdshim_create(void)
{
    struct nbdshim *s = malloc(sizeof *s);

    if (s == NULL)
        return NULL;
    s->h = nbd_create();
    if (s->h == NULL || pthread_mutex_init(&s->lock, NULL) != 0) {
        nbd_close(s->h);
        free(s);
        return NULL;
    }
    atomic_init(&s->owners, 1);
    (void)sem_init(&s->turn, 0, 1); /* fails only for larger numbers */
    atomic_init(&s->waiting, 0);
    atomic_init(&s->users, 1);
    atomic_init(&s->waker, -1);
    atomic_init(&s->socket, -1);
    atomic_init(&s->owner, 0);
    atomic_init(&s->timeout, 0);
    atomic_init(&s->is_connected, false);
    atomic_init(&s->is_stalled, false);
    atomic_init(&s->is_leaving, false);
    atomic_init(&s->orphans, 0);
    atomic_init(&s->orphan_bytes, 0);
    s->held = NULL;
    s->changing = NULL;
    atomic_init(&s->initializes, true);
#ifdef LIBNBD_HAVE_NBD_SET_PREAD_INITIALIZE
    (void)nbd_set_pread_initialize(s->h, false);
#endif
    return s;
}

void nbdshim_closure_hold(struct nbdshim_closure *c)
{
    struct nbdshim *s = c->s;

    pthread_mutex_lock(&s->lock);
    c->next = s->held;
    if (c->next != NULL)
        c->next->previous = c;
    s->held = c;
    pthread_mutex_unlock(&s->lock);
}

/* Take c out of the list of what libnbd holds. */
static void unlink_held(struct nbdshim_closure *c)
{
    struct nbdshim *s = c->s;

    pthread_mutex_lock(&s->lock);
    if (c->next != NULL)
        c->next->previous = c->previous;
    if (c->previous != NULL)
        c->previous->next = c->next;
    else
        s->held = c->next;
    pthread_mutex_unlock(&s->lock);
}

void nbdshim_push_released(struct nbdshim_closure *c)
{
    c->next = nbdshim_released;
    nbdshim_released = c;
}

/* Remove the closures of s from what libnbd has freed in this thread; the caller owns the list. */
static struct nbdshim_closure *take_released(const struct nbdshim *s)
{
    struct nbdshim_closure *taken = NULL, **link = &nbdshim_released;

    while (*link != NULL) {
        struct nbdshim_closure *c = *link;

        if (c->s == s) {
            *link = c->next;
            c->next = taken;
            taken = c;
        } else {
            link = &c->next;
        }
    }
    return taken;
}

/*
 * Hand over tokens, and say whether `release` has taken them.  A signal handler's exception may
 * keep it from its work, but only once: so it is tried again.
 */
static bool are_taken(const uintptr_t *tokens, size_t count)
{
    for (int i = 0; i < NBDSHIM_TRIES; i++) {
        if (nbdshim_up.release(tokens, count) == 0)
            return true;
    }
    return false;
}

void nbdshim_hand_over(struct nbdshim *s)
{
    struct nbdshim_closure *list = take_released(s), *next;

    while (list != NULL) {
        uintptr_t tokens[BATCH];
        size_t count = 0;
        struct nbdshim_closure *c;
        bool taken;

        for (c = list; c != NULL && count < BATCH; c = c->next)
            tokens[count++] = c->token;
        taken = are_taken(tokens, count);
        for (size_t i = 0; i < count; i++, list = next) {
            next = list->next;
            if (taken)
                free(list);
            else
                nbdshim_push_released(list);
        }
    }
}

/* Replace the waker by fd, which s owns from now on, or by none (-1).  The old one is closed. */
static void replace_waker(struct nbdshim *s, int fd)
{
    int old = atomic_exchange(&s->waker, fd);

    if (old >= 0)
        close(old);
}

void nbdshim_leave(struct nbdshim *s)
{
    if (atomic_fetch_sub_explicit(&s->users, 1, memory_order_acq_rel) == (NBDSHIM_CLOSING | 1)) {
        /* First: nbd_close may wait for a server that waits for the connection to end. */
        replace_waker(s, -1);
        nbd_close(s->h);
    }
    if (nbdshim_released != NULL && !nbdshim_is_reentry(s))
        nbdshim_hand_over(s);
}

/* Shut the connection down, so that the calls that wait in other threads come back. */
static void wake(struct nbdshim *s)
{
    int fd;

    /* In the child of a fork there are no such threads, and the connection is the parent's. */
    if (getpid() != atomic_load_explicit(&s->owner, memory_order_relaxed))
        return;
    fd = atomic_exchange(&s->waker, -1);
    if (fd >= 0) {
        (void)shutdown(fd, SHUT_RDWR);
        close(fd);
    }
}

void nbdshim_note_socket(struct nbdshim *s)
{
    int fd = nbd_aio_get_fd(s->h);
    int waker = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;

    /* If another thread has ended the connection meanwhile, fd may have been a stranger's file. */
    if (waker >= 0 && nbd_aio_get_fd(s->h) != fd) {
        close(waker);
        waker = -1;
    }
    atomic_store_explicit(&s->socket, fd, memory_order_relaxed);
    atomic_store_explicit(&s->owner, getpid(), memory_order_relaxed);
    replace_waker(s, waker);
    /*
     * nbdshim_close first marks the handle and then takes the waker.  Here the waker is stored
     * first, and then the mark is read: so one of the two threads wakes who waits.
     */
    if (atomic_load(&s->users) & NBDSHIM_CLOSING)
        wake(s);
}

void nbdshim_note_end(struct nbdshim *s)
{
    if (atomic_load_explicit(&s->waker, memory_order_relaxed) >= 0 &&
        (nbd_aio_is_dead(s->h) == 1 || nbd_aio_is_closed(s->h) == 1)) {
        wake(s); /* who polls it in another thread */
        replace_waker(s, -1);
    }
}

int nbdshim_close(struct nbdshim *s)
{
    unsigned users;

    if (s == NULL)
        return NBDSHIM_CLOSED;
    if (nbdshim_is_reentry(s))
        return NBDSHIM_REENTERED;
    users = atomic_fetch_or(&s->users, NBDSHIM_CLOSING);
    if (users & NBDSHIM_CLOSING)
        return NBDSHIM_CLOSED;
    if (users > 1)
        wake(s);
    nbdshim_leave(s);
    return 0;
}

/* NBDSHIM_CLOSED if s is closed, else 0. */
static int check_closed(struct nbdshim *s)
{
    return s == NULL || (atomic_load(&s->users) & NBDSHIM_CLOSING) ? NBDSHIM_CLOSED : 0;
}

void nbdshim_destroy(struct nbdshim *s)
{
    if (s == NULL)
        return;
    (void)nbdshim_close(s);
    nbdshim_disown(s);
}

void nbdshim_disown(struct nbdshim *s)
{
    if (atomic_fetch_sub(&s->owners, 1) != 1)
        return;
    if (atomic_load(&s->users) != NBDSHIM_CLOSING)
        return;
    for (struct nbdshim_closure *c = take_released(s), *next; c != NULL; c = next) {
        next = c->next;
        free(c);
    }
    pthread_mutex_destroy(&s->lock);
    sem_destroy(&s->turn);
    free(s);
}

bool nbdshim_holds(struct nbdshim *s, uintptr_t token)
{
    const struct nbdshim_closure *c;

    if (s == NULL)
        return false;
    /* In the child of a fork, a thread of the parent may have the lock: it is never unlocked. */
    for (int tries = 0; pthread_mutex_trylock(&s->lock) != 0; tries++) {
        if (tries == HOLDS_TRIES)
            return true;
        sched_yield();
    }
    c = s->held;
    while (c != NULL && c->token != token)
        c = c->next;
    pthread_mutex_unlock(&s->lock);
    return c != NULL;
}

int nbdshim_check(struct nbdshim *s)
{
    return nbdshim_is_reentry(s) ? NBDSHIM_REENTERED : check_closed(s);
}

int nbdshim_check_unlocked(struct nbdshim *s)
{
    return nbdshim_is_debugging(s) ? NBDSHIM_REENTERED : check_closed(s);
}

int nbdshim_set_timeout(struct nbdshim *s, double seconds)
{
    int closed = check_closed(s);

    if (closed == 0)
        atomic_store(&s->timeout, seconds);
    return closed;
}

double nbdshim_timeout(struct nbdshim *s)
{
    int closed = check_closed(s);

    return closed == 0 ? atomic_load(&s->timeout) : closed;
}

unsigned nbdshim_orphans(struct nbdshim *s)
{
    return s == NULL ? 0 : atomic_load(&s->orphans);
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
                        struct nbdshim_command *command, struct nbdshim_closure **closure)
{
    *closure = NULL;
    if (token == 0)
        return 0;
    *closure = malloc(sizeof **closure);
    if (*closure == NULL)
        return NBDSHIM_NO_MEMORY;
    **closure =
        (struct nbdshim_closure){.s = s, .token = token, .buffer = buffer, .command = command};
    nbdshim_closure_hold(*closure);
    return 0;
}

void nbdshim_closure_free(void *closure)
{
    struct nbdshim_closure *c = closure;

    if (c == NULL)
        return;
    unlink_held(c);
    if (c->released || nbdshim_is_silent())
        free(c);
    else
        nbdshim_push_released(c);
}

void nbdshim_closure_drop(struct nbdshim_closure *closure)
{
    if (closure == NULL)
        return;
    unlink_held(closure);
    free(closure);
}

uint32_t nbdshim_address_unix(void *addr, uint32_t room, const char *path, size_t length)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    /* A path ends with a NUL, which counts.  An abstract name begins with one. */
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

int nbdshim_clear_stale(int *state, void *p, size_t size)
{
    const struct timespec a_millisecond = {.tv_nsec = 1000000};

    for (int waited = 0; waited < 1000; waited++) {
        if (nbdshim_claim_stale(state)) {
            memset(p, 0, size);
            nbdshim_set_clean(state);
        }
        if (__atomic_load_n(state, __ATOMIC_ACQUIRE) == NBDSHIM_CLEAN)
            return 0;
        nanosleep(&a_millisecond, NULL);
    }
    return -1;
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
