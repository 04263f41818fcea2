// SPDX-License-Identifier: LGPL-2.0-or-later
/* Calls that wait, their turns, and orphans; see wait.h. */

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

/* The largest number of orphans of a handle, and the largest sum of their buffers. */
#define MAX_ORPHANS 64
#define MAX_ORPHAN_BYTES (UINT64_C(64) << 20)

/* How often the upcall `orphaned` is tried if signal handlers raise in it. */
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
 * Whether a call has to end although there may be data to read.  After the deadline it may read for
 * one more slice: the process may have been suspended, and what arrived meanwhile is in time.  The
 * limit is needed because a server may send without end.
 */
static bool is_over(struct nbdshim_wait *w)
{
    if (!is_past(w->deadline))
        return false;
    if (w->grace_end == 0)
        w->grace_end = nanoseconds(CLOCK_MONOTONIC) + SLICE;
    return is_past(w->grace_end);
}

/* Whether the command was answered; any thread that moves the connection may cause that. */
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
    /* Handlers are not part of the call: debug callbacks of their calls report their own names. */
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

/* Wait for the turn, counted in s->waiters so that queues let this thread go first. */
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
 * NBDSHIM_STOPPED or NBDSHIM_TIMED_OUT.  w->has_turn says whether this thread has the turn.
 */
static int take_turn(struct nbdshim_wait *w)
{
    while (sem_trywait(&w->s->turn) != 0) {
        int ret;

        w->has_waited = true;
        if (wait_for_turn(w->s, w->deadline))
            break;
        /* The thread that has the turn may have received our reply: then we need no turn. */
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

/* Run signal handlers between two slices, without the turn, since they may use the handle. */
static int pause_for_handlers(struct nbdshim_wait *w)
{
    int ret;

    give_back_turn(w);
    ret = run_handlers(w);
    /* Meanwhile another thread may have received our reply, so the caller checks is_done. */
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
 * Wait until the socket or fds[1] is ready.  Returns 1; 0 if `until` has passed; -1 if libnbd waits
 * for nothing or poll fails; NBDSHIM_STOPPED or NBDSHIM_TIMED_OUT.
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
        /* Nobody else reads from the socket while we have the turn, so the data stays there. */
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
    return events == 0 ? 0 : nbd_poll(s->h, 0); /* fails, and sets libnbd's error */
}

/*
 * Move the connection: wait for the socket, and notify libnbd.  Returns 0, -1 if libnbd failed, or
 * a refusal.  The caller has the turn; after a refusal it may not have it any more.
 */
static int move(struct nbdshim_wait *w)
{
    struct pollfd fds[2] = {{.fd = -1}, {.fd = -1}};
    int ret;

    /*
     * poll reports data even after the deadline, so without this check a server that never stops
     * sending would keep the call in its loop.  The first move always happens.
     */
    if (w->has_moved && is_over(w))
        return NBDSHIM_TIMED_OUT;
    w->has_moved = true;
    ret = wait_for_socket(w, fds, NEVER);
    if (ret == 1)
        ret = nbdshim_notify(w->s, fds[0].revents);
    else if (ret == -1)
        ret = nbd_poll(w->s->h, 0); /* fails, and sets libnbd's error */
    return ret > 0 ? 0 : ret;
}

/* Move the connection until libnbd has finished to connect or to negotiate an option. */
static int finish_connecting(struct nbdshim_wait *w)
{
    int ret = 0;

    while (ret == 0 && nbd_aio_is_connecting(w->s->h) == 1)
        ret = move(w);
    return ret;
}

/* Complete a connect or an option that was stopped earlier.  Returns as move does. */
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

/*
 * Drop libnbd's or the caller's reference to a command.  The last one frees it, and if it was an
 * orphan, that is the end of the orphan.
 */
static void unref_command(struct nbdshim_command *c)
{
    struct nbdshim *s = c->buffer.s;

    if (atomic_fetch_sub(&c->references, 1) != 1)
        return;
    /* The other side is gone, and what it wrote to *c happened before its decrement. */
    if (atomic_load(&c->state) & NBDSHIM_ORPHAN)
        nbdshim_remove_orphan(s, &c->range, c->size);
    if (c->buffer.token != 0)
        nbdshim_closure_free(&c->buffer);
    else
        free(c);
}

/*
 * libnbd's completion callback.  An orphan is retired here, because no caller will retire it with
 * nbd_aio_command_completed.
 */
// cppcheck-suppress constParameter ; libnbd has declared it
static int complete(void *user_data, int *error)
{
    struct nbdshim_command *c = user_data;

    c->error = *error; /* before DONE, after which the waiting thread reads it */
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
 * Have the caller keep the buffer of a command that is about to become an orphan.  The upcall
 * `orphaned` gets a token for it, the command's address, and is tried again if a signal handler
 * raises in it.  Returns whether the buffer is kept; the upcall fails if stack or memory is
 * exhausted.
 */
static bool keep_buffer(struct nbdshim_command *c)
{
    uintptr_t token = (uintptr_t)c;

    if (!c->has_buffer_alone || c->buffer.token != 0 || nbdshim_is_silent())
        return true;
    for (int i = 0; i < MAX_KEEP_TRIES; i++) {
        if (nbdshim_up.orphaned(token) == 0) {
            /* libnbd cannot free the command meanwhile: the caller's reference is still there. */
            c->buffer.token = token;
            nbdshim_closure_hold(&c->buffer);
            return true;
        }
    }
    return false;
}

/* Make a command an orphan.  Returns whether it was done already. */
static bool orphan(struct nbdshim_command *c)
{
    /* Add it first: once the bit is set, the last reference to go removes the orphan again. */
    nbdshim_add_orphan(c->buffer.s, &c->range, c->size);
    return atomic_fetch_or(&c->state, NBDSHIM_ORPHAN) & NBDSHIM_DONE;
}

/* End a waiting call: give the turn back, drop the command, leave the handle.  Returns ret. */
static int finish(struct nbdshim_wait *w, int ret)
{
    struct nbdshim *s = w->s;

    if (ret == -1)
        nbdshim_note_end(s);
    if (ret < -1 && w->has_moved && nbd_aio_is_connecting(s->h) == 1)
        atomic_store(&s->is_stalled, true);
    /* Before nbdshim_leave, which runs `release`: that may use the handle and wait for its turn. */
    give_back_turn(w);
    nbdshim_current_wait = w->outer;
    if (w->command != NULL)
        unref_command(w->command);
    nbdshim_leave(s);
    return ret;
}

/* Begin a call as nbdshim_begin does, but wait for the turn only until `until`. */
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
    /*
     * Wait for orphans.  This thread has the turn, so it has to move the connection itself to make
     * them retire.  A command that becomes an orphan after this check does not matter: its caller
     * is still waiting now, so the two are concurrent, and nothing orders them.
     */
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
    atomic_init(&c->references, 2); /* libnbd's and the caller's */
    atomic_init(&c->state, 0);
    w->command = c;
    return 0;
}

int nbdshim_end(struct nbdshim_wait *w, int ret)
{
    if (w->command != NULL)
        unref_command(w->command); /* libnbd's reference: libnbd did not get the command */
    return finish(w, ret);
}

/*
 * Wait until the command is done.  Returns 0, -1 or a refusal.  If the buffer cannot be kept, this
 * keeps waiting after the timeout, because the caller would free memory that libnbd may still write
 * to.
 */
static int wait_for_reply(struct nbdshim_wait *w)
{
    for (;;) {
        int ret = w->has_turn ? 0 : take_turn(w);

        while (ret == 0 && !is_done(w))
            ret = move(w);
        /*
         * If the call is stopped, keep the buffer before the command becomes an orphan: from then
         * on another thread may retire it, and that releases the token.
         */
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
        return finish(w, -1); /* libnbd has freed the completion, and so dropped its reference */
    ret = wait_for_reply(w);
    if (ret == 0) {
        /*
         * The completion has returned 0, so the command is not retired yet.  Nobody else can retire
         * it: only this thread knows the cookie, and the command has not become an orphan.
         */
        ret = nbd_aio_command_completed(h, (uint64_t)cookie) == 1 ? 0 : -1;
    } else if (!(ret == -1 && is_done(w)) && orphan(w->command)) {
        /*
         * The reply arrived after the stop, in another thread, and before the command became an
         * orphan.  Its completion found no orphan and has left the retiring to us.  Both sides set
         * their bit with atomic_fetch_or and look at the other's, so exactly one retires.
         *
         * The condition leaves out a failed connection, which has ended the command itself: libnbd
         * retires it when the handle is closed, and its last error now says more than the
         * command's.
         */
        (void)nbd_aio_command_completed(h, (uint64_t)cookie);
    }
    return finish(w, ret);
}

/* Whether libnbd's last error says why an option failed, as newer versions set it. */
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
    /* An option has no cookie to retire: libnbd frees its completion when the option has ended. */
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

/* Let libnbd poll without waiting; it fails and sets its error. */
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

/* Do nbd_poll2, or nbd_poll if fd is -1. */
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
 * Do nbd_aio_notify_read or, for POLLOUT, nbd_aio_notify_write.  If this thread had to wait for the
 * turn, another one has moved the connection meanwhile and may have consumed the event that the
 * caller has seen; so poll the socket again.
 */
static int notify_of(struct nbdshim *s, const char *name, short event)
{
    struct nbdshim_wait w;
    struct pollfd fd = {.fd = -1, .events = event};
    int ret = nbdshim_begin(&w, s, name);

    if (ret != 0)
        return ret;
    fd.fd = nbdshim_socket_of(s);
    /* With the turn, nobody can consume the event between this poll and the notification. */
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

/* Start to disconnect, unless that was done before.  Returns libnbd's result. */
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

/* Whether calls that do not wait can do this shutdown; if not, libnbd has to wait itself. */
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
