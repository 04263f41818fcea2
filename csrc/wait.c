// SPDX-License-Identifier: LGPL-2.0-or-later
/* Calls that wait, and orphans; see wait.h. */

#include "wait.h"
#include "nbdglue.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SECOND NBDSHIM_SECOND
#define MILLISECOND NBDSHIM_MILLISECOND
#define NEVER NBDSHIM_NEVER
#define SLICE NBDSHIM_SLICE

/* The largest number of orphans of a handle, and of bytes in their buffers. */
#define MAX_ORPHANS 64
#define MAX_ORPHAN_BYTES (UINT64_C(64) << 20)

/* So often an upcall is tried if handlers of signals raise in it. */
#define MAX_KEEP_TRIES 100

_Thread_local struct nbdshim_wait *nbdshim_current_wait;

static int64_t nanoseconds(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

int64_t nbdshim_now(void)
{
    return nanoseconds(CLOCK_MONOTONIC);
}

int64_t nbdshim_slice(int64_t until)
{
    int64_t left = until == NEVER ? SLICE : until - nanoseconds(CLOCK_MONOTONIC);

    if (left < 0)
        return 0;
    return left < SLICE ? left : SLICE;
}

int64_t nbdshim_deadline(double seconds)
{
    if (seconds < 0 || seconds >= (double)(NEVER / SECOND / 2))
        return NEVER;
    return nanoseconds(CLOCK_MONOTONIC) + (int64_t)(seconds * (double)SECOND);
}

static bool is_past(int64_t time)
{
    return time != NEVER && nbdshim_slice(time) == 0;
}

/*
 * Whether a call that can go on without waiting has to end.  The process may have been suspended
 * for longer than the deadline, so what has arrived is taken first; but not for ever, since a
 * server may send without end.
 */
static bool is_over(struct nbdshim_wait *w)
{
    if (!is_past(w->deadline))
        return false;
    if (w->grace_end == 0)
        w->grace_end = nanoseconds(CLOCK_MONOTONIC) + SLICE;
    return is_past(w->grace_end);
}

static bool is_done(const struct nbdshim_wait *w)
{
    return w->command != NULL && (atomic_load(&w->command->state) & NBDSHIM_DONE);
}

int nbdshim_run_handlers(bool *has_forked)
{
    unsigned forks = atomic_load(&nbdshim_forks);
    struct nbdshim_wait *w = nbdshim_current_wait;
    int ret;

    *has_forked = false;
    if (nbdshim_is_silent())
        return NBDSHIM_STOPPED;
    nbdshim_current_wait = NULL;
    ret = nbdshim_up.interrupted();
    nbdshim_current_wait = w;
    *has_forked = atomic_load(&nbdshim_forks) != forks;
    return ret == 0 ? 0 : NBDSHIM_STOPPED;
}

static int run_handlers(struct nbdshim_wait *w)
{
    bool has_forked;
    int ret = nbdshim_run_handlers(&has_forked);

    if (has_forked)
        nbdshim_disconnect_child(w->s);
    return ret;
}

bool nbdshim_wait_for_turn(sem_t *turn, int64_t deadline)
{
    int64_t until = nanoseconds(CLOCK_REALTIME) + nbdshim_slice(deadline);
    struct timespec end = {.tv_sec = until / SECOND, .tv_nsec = until % SECOND};

    return sem_timedwait(turn, &end) == 0;
}

/* The same, seen by a queue that moves the handle too: it lets those go first who wait for it. */
static bool wait_for_turn(struct nbdshim *s, int64_t deadline)
{
    bool has_turn;

    atomic_fetch_add(&s->waiters, 1);
    has_turn = nbdshim_wait_for_turn(&s->turn, deadline);
    atomic_fetch_sub(&s->waiters, 1);
    return has_turn;
}

/*
 * Wait for the turn, or until another thread has moved our command to its end.  Returns 0,
 * NBDSHIM_STOPPED or NBDSHIM_TIMED_OUT.
 */
static int take_turn(struct nbdshim_wait *w)
{
    while (sem_trywait(&w->s->turn) != 0) {
        int ret;

        w->has_waited = true;
        if (wait_for_turn(w->s, w->deadline))
            break;
        if (is_done(w))
            return 0;
        if (is_past(w->deadline))
            return NBDSHIM_TIMED_OUT;
        ret = run_handlers(w);
        if (ret != 0)
            return ret;
    }
    w->has_turn = true;
    return 0;
}

static void give_back_turn(struct nbdshim_wait *w)
{
    if (w->has_turn)
        sem_post(&w->s->turn);
    w->has_turn = false;
}

/* Between two slices: run the handlers.  They may use the handle, so the turn is given back. */
static int pause_for_handlers(struct nbdshim_wait *w)
{
    int ret;

    give_back_turn(w);
    ret = run_handlers(w);
    return ret != 0 ? ret : take_turn(w);
}

int nbdshim_socket_of(struct nbdshim *s)
{
    int socket_dup;

    if (!atomic_load_explicit(&s->is_connected, memory_order_relaxed)) {
        if (nbd_aio_is_connecting(s->h) == 1)
            nbdshim_note_socket(s);
        else if (atomic_load(&s->socket_dup) >= 0)
            atomic_store_explicit(&s->is_connected, true, memory_order_relaxed);
    }
    socket_dup = atomic_load(&s->socket_dup);
    return socket_dup >= 0 ? socket_dup : nbd_aio_get_fd(s->h);
}

/*
 * Wait until the socket or fds[1] is ready.  Returns 1; 0 if `until` is past; -1 if libnbd waits
 * for nothing, or poll fails; or why the call has to stop.
 */
static int wait_for_socket(struct nbdshim_wait *w, struct pollfd fds[2], int64_t until)
{
    struct nbdshim *s = w->s;
    int64_t end = until < w->deadline ? until : w->deadline;

    for (;;) {
        unsigned direction = nbd_aio_get_direction(s->h);
        int ready, ret;

        if (direction == 0)
            return -1;
        fds[0].fd = nbdshim_socket_of(s);
        fds[0].events = 0;
        if (direction & LIBNBD_AIO_DIRECTION_READ)
            fds[0].events |= POLLIN;
        if (direction & LIBNBD_AIO_DIRECTION_WRITE)
            fds[0].events |= POLLOUT;
        ready = poll(fds, 2, (int)((nbdshim_slice(end) + MILLISECOND - 1) / MILLISECOND));
        if (ready > 0)
            return 1;
        if (ready == -1 && errno != EINTR)
            return -1;
        if (ready == 0 && is_past(until))
            return 0;
        if (ready == 0 && is_past(w->deadline))
            return NBDSHIM_TIMED_OUT;
        ret = pause_for_handlers(w);
        if (ret != 0 || is_done(w))
            return ret;
    }
}

int nbdshim_notify(struct nbdshim *s, short events)
{
    if (events & (POLLIN | POLLHUP))
        return nbd_aio_notify_read(s->h);
    if (events & POLLOUT)
        return nbd_aio_notify_write(s->h);
    return events == 0 ? 0 : nbd_poll(s->h, 0); /* an error, and libnbd's words for it */
}

/* Wait for the socket and let libnbd go on.  Returns 0, -1 (libnbd's failure) or a refusal. */
static int move(struct nbdshim_wait *w)
{
    struct pollfd fds[2] = {{.fd = -1}, {.fd = -1}};
    int ret;

    if (w->has_moved && is_over(w))
        return NBDSHIM_TIMED_OUT;
    w->has_moved = true;
    ret = wait_for_socket(w, fds, NEVER);
    if (ret == 1)
        ret = nbdshim_notify(w->s, fds[0].revents);
    else if (ret == -1)
        ret = nbd_poll(w->s->h, 0); /* fails, and says why */
    return ret > 0 ? 0 : ret;
}

/* Move until libnbd is no longer connecting or working on an option. */
static int finish_connecting(struct nbdshim_wait *w)
{
    int ret = 0;

    while (ret == 0 && nbd_aio_is_connecting(w->s->h) == 1)
        ret = move(w);
    return ret;
}

/* Finish what was stopped and goes on: a connect, an option.  Returns as move does. */
static int finish_stalled(struct nbdshim_wait *w)
{
    int ret = 0;

    if (atomic_load_explicit(&w->s->is_stalled, memory_order_relaxed)) {
        ret = finish_connecting(w);
        if (ret == 0)
            atomic_store(&w->s->is_stalled, false);
    }
    return ret;
}

/* Let go of a command, for libnbd or for the caller.  The last one frees it. */
static void unref_command(struct nbdshim_command *c)
{
    struct nbdshim *s = c->buffer.s;

    if (atomic_fetch_sub(&c->references, 1) != 1)
        return;
    if (atomic_load(&c->state) & NBDSHIM_ORPHAN)
        nbdshim_remove_orphan(s, &c->range, c->size);
    if (c->buffer.token != 0)
        nbdshim_closure_free(&c->buffer);
    else
        free(c);
}

/* libnbd's completion callback.  An orphan is retired at once: nobody asks for it. */
// cppcheck-suppress constParameter ; libnbd has declared it
static int complete(void *user_data, int *error)
{
    struct nbdshim_command *c = user_data;

    c->error = *error;
    return atomic_fetch_or(&c->state, NBDSHIM_DONE) & NBDSHIM_ORPHAN ? 1 : 0;
}

static void free_completion(void *user_data)
{
    unref_command(user_data);
}

nbd_completion_callback nbdshim_completion(struct nbdshim_wait *w)
{
    return (nbd_completion_callback){
        .callback = complete, .user_data = w->command, .free = free_completion};
}

/*
 * Have the buffer of a command kept that is being stopped, under a token: the command's address. If
 * a signal handler's exception keeps the upcall from it, it is tried again.  Returns whether it is
 * kept; it is not if the stack is full, or if there is no memory.
 */
static bool keep_buffer(struct nbdshim_command *c)
{
    uintptr_t token = (uintptr_t)c;

    if (!c->has_buffer_alone || c->buffer.token != 0 || nbdshim_is_silent())
        return true;
    for (int i = 0; i < MAX_KEEP_TRIES; i++) {
        if (nbdshim_up.orphaned(token) == 0) {
            c->buffer.token = token;
            nbdshim_closure_hold(&c->buffer);
            return true;
        }
    }
    return false;
}

/* Make an orphan of the command of a call that is stopped.  Returns whether it was done already. */
static bool orphan(struct nbdshim_command *c)
{
    nbdshim_add_orphan(c->buffer.s, &c->range, c->size);
    return atomic_fetch_or(&c->state, NBDSHIM_ORPHAN) & NBDSHIM_DONE;
}

/* The end of every call that waits; returns ret. */
static int finish(struct nbdshim_wait *w, int ret)
{
    struct nbdshim *s = w->s;

    if (ret == -1)
        nbdshim_note_end(s);
    if (ret < -1 && w->has_moved && nbd_aio_is_connecting(s->h) == 1)
        atomic_store(&s->is_stalled, true);
    give_back_turn(w);
    nbdshim_current_wait = w->outer;
    if (w->command != NULL)
        unref_command(w->command);
    nbdshim_leave(s);
    return ret;
}

/* The same as nbdshim_begin, but it waits for the turn at most until `until`. */
static int begin_until(struct nbdshim_wait *w, struct nbdshim *s, const char *name, int64_t until)
{
    int ret = nbdshim_enter(s);
    int64_t deadline;
    double timeout;

    if (ret != 0)
        return ret;
    timeout = atomic_load_explicit(&s->timeout, memory_order_relaxed);
    *w = (struct nbdshim_wait){
        .s = s, .name = name, .outer = nbdshim_current_wait, .deadline = NEVER};
    nbdshim_current_wait = w;
    if (timeout > 0)
        w->deadline = nbdshim_deadline(timeout);
    deadline = w->deadline;
    if (until < deadline)
        w->deadline = until;
    ret = take_turn(w);
    w->deadline = deadline;
    return ret == 0 ? 0 : finish(w, ret);
}

int nbdshim_begin(struct nbdshim_wait *w, struct nbdshim *s, const char *name)
{
    return begin_until(w, s, name, NEVER);
}

void nbdshim_add_orphan(struct nbdshim *s, struct nbdshim_range *range, size_t size)
{
    atomic_fetch_add(&s->orphans, 1);
    atomic_fetch_add(&s->orphan_bytes, size);
    if (range->start == range->stop)
        return;
    pthread_mutex_lock(&s->lock);
    range->previous = NULL;
    range->next = s->changing;
    if (range->next != NULL)
        range->next->previous = range;
    s->changing = range;
    pthread_mutex_unlock(&s->lock);
}

void nbdshim_remove_orphan(struct nbdshim *s, struct nbdshim_range *range, size_t size)
{
    if (range->start != range->stop) {
        pthread_mutex_lock(&s->lock);
        if (range->next != NULL)
            range->next->previous = range->previous;
        if (range->previous != NULL)
            range->previous->next = range->next;
        else
            s->changing = range->next;
        pthread_mutex_unlock(&s->lock);
    }
    atomic_fetch_sub(&s->orphan_bytes, size);
    atomic_fetch_sub(&s->orphans, 1);
}

bool nbdshim_is_changing(struct nbdshim *s, uint64_t start, uint64_t stop)
{
    const struct nbdshim_range *range;

    if (atomic_load_explicit(&s->orphans, memory_order_relaxed) == 0)
        return false;
    pthread_mutex_lock(&s->lock);
    range = s->changing;
    while (range != NULL && !(range->start < stop && start < range->stop))
        range = range->next;
    pthread_mutex_unlock(&s->lock);
    return range != NULL;
}

bool nbdshim_is_full(struct nbdshim *s, unsigned in_flight, size_t size)
{
    unsigned orphans = atomic_load_explicit(&s->orphans, memory_order_relaxed);

    return orphans != 0 && (orphans + in_flight >= MAX_ORPHANS ||
                            atomic_load(&s->orphan_bytes) + size > MAX_ORPHAN_BYTES);
}

int nbdshim_begin_command(struct nbdshim_wait *w, struct nbdshim *s, const char *name,
                          const struct nbdshim_plan *plan)
{
    uint64_t stop = plan->offset + plan->count;
    int ret = nbdshim_begin(w, s, name);
    struct nbdshim_command *c;

    if (ret != 0)
        return ret;
    ret = finish_stalled(w);
    while (ret == 0 && (nbdshim_is_full(s, 0, plan->size) ||
                        (plan->count > 0 && nbdshim_is_changing(s, plan->offset, stop))))
        ret = move(w);
    if (ret != 0)
        return finish(w, ret);
    c = malloc(sizeof *c);
    if (c == NULL)
        return finish(w, NBDSHIM_NO_MEMORY);
    *c = (struct nbdshim_command){
        .buffer = {.s = s}, .size = plan->size, .has_buffer_alone = plan->has_buffer_alone};
    if (plan->changes)
        c->range = (struct nbdshim_range){.start = plan->offset, .stop = stop};
    atomic_init(&c->references, 2);
    atomic_init(&c->state, 0);
    w->command = c;
    return 0;
}

int nbdshim_end(struct nbdshim_wait *w, int ret)
{
    if (w->command != NULL)
        unref_command(w->command); /* for libnbd, which was not given it */
    return finish(w, ret);
}

/*
 * Wait until the command is done.  Returns 0, or why the call ends without it.  If the buffer
 * cannot be kept, it waits longer: the caller would free memory that libnbd may still write to.
 */
static int wait_for_reply(struct nbdshim_wait *w)
{
    for (;;) {
        int ret = w->has_turn ? 0 : take_turn(w);

        while (ret == 0 && !is_done(w))
            ret = move(w);
        if (ret == 0 || is_done(w) || keep_buffer(w->command))
            return ret;
        w->deadline = nanoseconds(CLOCK_MONOTONIC) + SLICE;
    }
}

int nbdshim_end_command(struct nbdshim_wait *w, int64_t cookie)
{
    struct nbd_handle *h = w->s->h;
    int ret;

    if (cookie == -1)
        return finish(w, -1);
    ret = wait_for_reply(w);
    if (ret == 0)
        ret = nbd_aio_command_completed(h, (uint64_t)cookie) == 1 ? 0 : -1;
    /* If the connection has failed, it has ended its commands.  Its error says more than theirs. */
    else if (!(ret == -1 && is_done(w)) && orphan(w->command))
        (void)nbd_aio_command_completed(h, (uint64_t)cookie);
    return finish(w, ret);
}

/* Whether libnbd's last error says why an option failed, as it does in newer versions. */
static bool is_explained(void)
{
#ifdef LIBNBD_HAVE_NBD_OPT_STARTTLS
    const char *error = nbd_get_error();

    return error != NULL && strncmp(error, "nbd_aio_", strlen("nbd_aio_")) == 0;
#else
    return false;
#endif
}

int nbdshim_end_option(struct nbdshim_wait *w, int ret, enum nbdshim_answer answer)
{
    struct nbdshim_command *c = w->command;

    if (ret == 0)
        ret = finish_connecting(w);
    if (ret < -1 && c != NULL)
        (void)orphan(c);
    if (ret != 0 || c == NULL)
        return finish(w, ret);
    if (answer == NBDSHIM_GRANTED)
        ret = nbd_aio_is_negotiating(w->s->h) == 1 ? c->error == 0 : -1;
    else if (c->error != 0)
        ret = answer == NBDSHIM_SUCCESS && is_explained() ? -1 : NBDSHIM_OPTION_FAILED - c->error;
    else if (answer == NBDSHIM_ITEMS)
        ret = c->items;
    return finish(w, ret);
}

int nbdshim_end_connect(struct nbdshim_wait *w, int ret)
{
    struct nbd_handle *h = w->s->h;

    if (ret == 0) {
        nbdshim_note_socket(w->s);
        ret = finish_connecting(w);
    }
    if (ret == 0) {
        nbdshim_note_socket(w->s);
        if (nbd_aio_is_ready(h) != 1 && nbd_aio_is_negotiating(h) != 1)
            ret = nbd_aio_is_closed(h) == 1 ? NBDSHIM_SERVER_CLOSED : -1;
    }
    return finish(w, ret);
}

/* What libnbd says of a poll that does not wait: its failure and the words for it. */
static int poll_at_once(struct nbd_handle *h, int fd)
{
#ifdef LIBNBD_HAVE_NBD_POLL2
    if (fd >= 0)
        return nbd_poll2(h, fd, 0);
#else
    (void)fd;
#endif
    return nbd_poll(h, 0);
}

/* nbd_poll2, or nbd_poll if fd is -1. */
static int poll_both(struct nbdshim *s, const char *name, int fd, int timeout)
{
    struct nbdshim_wait w;
    struct pollfd fds[2] = {{.fd = -1}, {.fd = fd, .events = POLLIN}};
    int64_t until = NEVER;
    int ret;

    if (timeout >= 0)
        until = nanoseconds(CLOCK_MONOTONIC) + timeout * MILLISECOND;
    ret = begin_until(&w, s, name, until);
    if (ret != 0)
        return ret == NBDSHIM_TIMED_OUT && is_past(until) ? 0 : ret;
    ret = wait_for_socket(&w, fds, until);
    if (ret == 1)
        ret = nbdshim_notify(s, fds[0].revents) == -1 ? -1 : 1;
    else if (ret == -1)
        ret = poll_at_once(s->h, fd);
    return finish(&w, ret);
}

int nbdshim_poll(struct nbdshim *s, int timeout)
{
    return poll_both(s, "nbd_poll", -1, timeout);
}

int nbdshim_poll2(struct nbdshim *s, int fd, int timeout)
{
    return poll_both(s, "nbd_poll2", fd, timeout);
}

/*
 * nbd_aio_notify_read or, for POLLOUT, nbd_aio_notify_write.  If another thread has moved the
 * connection meanwhile, what the caller knows may be outdated: so the socket is asked again.
 */
static int notify_of(struct nbdshim *s, const char *name, short event)
{
    struct nbdshim_wait w;
    struct pollfd fd = {.fd = -1, .events = event};
    int ret = nbdshim_begin(&w, s, name);

    if (ret != 0)
        return ret;
    fd.fd = nbdshim_socket_of(s);
    if (w.has_waited && poll(&fd, 1, 0) == 0)
        return finish(&w, 0);
    ret = event == POLLIN ? nbd_aio_notify_read(s->h) : nbd_aio_notify_write(s->h);
    return finish(&w, ret);
}

int nbdshim_aio_notify_read(struct nbdshim *s)
{
    return notify_of(s, "nbd_aio_notify_read", POLLIN);
}

int nbdshim_aio_notify_write(struct nbdshim *s)
{
    return notify_of(s, "nbd_aio_notify_write", POLLOUT);
}

int nbdshim_opt_abort(struct nbdshim *s)
{
    struct nbdshim_wait w;
    int ret = nbdshim_begin(&w, s, "nbd_opt_abort");

    if (ret != 0)
        return ret;
    ret = finish_stalled(&w);
    if (ret == 0)
        ret = nbd_aio_opt_abort(s->h);
    if (ret == 0)
        ret = finish_connecting(&w);
    return finish(&w, ret);
}

/* Say good-bye to the server, unless that was done before.  Returns libnbd's result. */
static int start_disconnect(struct nbdshim *s)
{
    if (nbd_aio_is_negotiating(s->h) == 1)
        return nbd_aio_opt_abort(s->h);
    if (!atomic_load(&s->is_disconnecting)) {
        if (nbd_aio_disconnect(s->h, 0) == -1)
            return -1;
        nbdshim_note_disconnect(s);
    }
    return 0;
}

/* Whether a shutdown can be made of calls that do not wait: else libnbd waits by itself. */
static bool can_disconnect_here(struct nbd_handle *h, uint32_t flags)
{
    bool is_busy = nbd_aio_is_processing(h) == 1;

#ifdef LIBNBD_SHUTDOWN_ABANDON_PENDING
    if (!is_busy)
        flags &= ~LIBNBD_SHUTDOWN_ABANDON_PENDING; /* nothing is pending */
#endif
    return flags == 0 && (is_busy || nbd_aio_is_ready(h) == 1 || nbd_aio_is_negotiating(h) == 1);
}

int nbdshim_shutdown(struct nbdshim *s, uint32_t flags)
{
    struct nbdshim_wait w;
    int ret = nbdshim_begin(&w, s, "nbd_shutdown");

    if (ret != 0)
        return ret;
    ret = finish_stalled(&w);
    if (ret == 0)
        ret = can_disconnect_here(s->h, flags) ? start_disconnect(s) : nbd_shutdown(s->h, flags);
    while (ret == 0 && nbd_aio_is_closed(s->h) != 1 && nbd_aio_is_dead(s->h) != 1)
        ret = move(&w);
    nbdshim_note_end(s);
    return finish(&w, ret);
}
