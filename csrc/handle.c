// SPDX-License-Identifier: LGPL-2.0-or-later
/* Handles: create, close and free them; see nbdshim.h for the ABI and handle.h for the rest. */

#include "handle.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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
    atomic_init(&s->references, 1);
    (void)sem_init(&s->turn, 0, 1); /* cannot fail for this value */
    atomic_init(&s->waiters, 0);
    atomic_init(&s->users, 1);
    atomic_init(&s->socket_dup, -1);
    atomic_init(&s->socket, -1);
    atomic_init(&s->pid, 0);
    atomic_init(&s->timeout, 0);
    atomic_init(&s->is_connected, false);
    atomic_init(&s->is_stalled, false);
    atomic_init(&s->is_disconnecting, false);
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

/* Replace socket_dup by fd, which s then owns, or by -1; close the old one. */
static void replace_socket_dup(struct nbdshim *s, int fd)
{
    int old = atomic_exchange(&s->socket_dup, fd);

    if (old >= 0)
        close(old);
}

void nbdshim_leave(struct nbdshim *s)
{
    if (atomic_fetch_sub_explicit(&s->users, 1, memory_order_acq_rel) == (NBDSHIM_CLOSING | 1)) {
        /*
         * Close the duplicate first: nbd_close may wait for a server process, and that waits for
         * the last descriptor of the connection to be closed.
         */
        replace_socket_dup(s, -1);
        nbd_close(s->h);
    }
    if (nbdshim_released != NULL && !nbdshim_is_reentry(s))
        nbdshim_release_tokens(s);
}

/* Shut the connection down, so that calls that wait in other threads return. */
static void wake(struct nbdshim *s)
{
    int fd;

    /* A forked child has no such threads, and a shutdown would end the parent's connection. */
    if (getpid() != atomic_load_explicit(&s->pid, memory_order_relaxed))
        return;
    fd = atomic_exchange(&s->socket_dup, -1);
    if (fd >= 0) {
        (void)shutdown(fd, SHUT_RDWR);
        close(fd);
    }
}

void nbdshim_note_socket(struct nbdshim *s)
{
    int fd = nbd_aio_get_fd(s->h);
    int socket_dup = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;

    /*
     * If another thread ended the connection between these two calls, fd may have belonged to an
     * unrelated file when it was duplicated.
     */
    if (socket_dup >= 0 && nbd_aio_get_fd(s->h) != fd) {
        close(socket_dup);
        socket_dup = -1;
    }
    atomic_store_explicit(&s->socket, fd, memory_order_relaxed);
    atomic_store_explicit(&s->pid, getpid(), memory_order_relaxed);
    replace_socket_dup(s, socket_dup);
    /*
     * nbdshim_close sets the closing bit and then takes socket_dup; this thread stores socket_dup
     * and then reads the bit.  All four are sequentially consistent, so at least one of the two
     * threads sees what the other did, and shuts the connection down.
     */
    if (atomic_load(&s->users) & NBDSHIM_CLOSING)
        wake(s);
}

void nbdshim_note_end(struct nbdshim *s)
{
    if (atomic_load_explicit(&s->socket_dup, memory_order_relaxed) >= 0 &&
        (nbd_aio_is_dead(s->h) == 1 || nbd_aio_is_closed(s->h) == 1)) {
        wake(s); /* another thread may be polling it */
        replace_socket_dup(s, -1);
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

/* Return NBDSHIM_CLOSED if s is closed or NULL, else 0. */
static int check_closed(struct nbdshim *s)
{
    return s == NULL || (atomic_load(&s->users) & NBDSHIM_CLOSING) ? NBDSHIM_CLOSED : 0;
}

void nbdshim_destroy(struct nbdshim *s)
{
    if (s == NULL)
        return;
    (void)nbdshim_close(s);
    nbdshim_unref(s);
}

void nbdshim_unref(struct nbdshim *s)
{
    if (atomic_fetch_sub(&s->references, 1) != 1)
        return;
    if (atomic_load(&s->users) != NBDSHIM_CLOSING)
        return;
    nbdshim_discard_released(s);
    pthread_mutex_destroy(&s->lock);
    sem_destroy(&s->turn);
    free(s);
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
