// SPDX-License-Identifier: LGPL-2.0-or-later
/* How an event loop watches a queue; see watch.h. */

#include "watch.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

/* Whether this process created the epoll; if not, it belongs to the parent. */
static bool is_ours(const struct nbdqueue *q)
{
    return atomic_load_explicit(&nbdshim_forks, memory_order_relaxed) == q->forks;
}

/* Add a descriptor to the epoll, change its events, or remove it if `events` is 0. */
static int change(const struct nbdqueue *q, int fd, uint32_t before, uint32_t events)
{
    struct epoll_event event = {.events = events};
    int what = before == 0 ? EPOLL_CTL_ADD : events == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;

    return before == events ? 0 : epoll_ctl(q->epoll, what, fd, &event);
}

int watch_add(const struct nbdqueue *q, struct member *m)
{
    if (q->epoll < 0 || m->is_lost || !m->is_entered)
        return 0;
    m->socket = nbdshim_socket_of(m->s);
    m->events = EPOLLIN;
    return change(q, m->socket, 0, EPOLLIN);
}

int watch_begin(struct nbdqueue *q)
{
    q->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    q->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (q->timer >= 0 && q->epoll >= 0 && change(q, q->wakeup_fd, 0, EPOLLIN) == 0 &&
        change(q, q->timer, 0, EPOLLIN) == 0) {
        size_t i = 0;

        while (i < q->count && watch_add(q, &q->members[i]) == 0)
            i++;
        if (i == q->count)
            return q->epoll;
    }
    watch_end(q);
    return -1;
}

/* The events that libnbd waits for. */
static uint32_t wanted(const struct member *m)
{
    unsigned direction = nbd_aio_get_direction(m->s->h);
    uint32_t events = 0;

    if (direction & LIBNBD_AIO_DIRECTION_READ)
        events |= EPOLLIN;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        events |= EPOLLOUT;
    return events;
}

/* Make the epoll ready after the retry interval. */
static void start_timer(struct nbdqueue *q)
{
    struct itimerspec once = {.it_value.tv_nsec = SHARED_RETRY_INTERVAL};

    if (!q->is_timing)
        q->is_timing = timerfd_settime(q->timer, 0, &once, NULL) == 0;
}

void watch_stop_timer(struct nbdqueue *q)
{
    const struct itimerspec never = {.it_value.tv_nsec = 0};

    if (q->is_timing && is_ours(q))
        (void)timerfd_settime(q->timer, 0, &never, NULL); /* this also resets an expiry */
    q->is_timing = false;
}

void watch_update(struct nbdqueue *q)
{
    if (q->epoll < 0 || !is_ours(q))
        return;
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];
        uint32_t events;

        if (m->socket < 0)
            continue;
        if (m->is_lost || q->is_dropped || !m->is_entered) {
            watch_remove(q, m);
            continue;
        }
        events = m->is_shared ? 0 : wanted(m);
        if (change(q, m->socket, m->events, events) == 0)
            m->events = events;
        if (events == 0 || q->blocked != NULL) /* another thread may move the handle */
            start_timer(q);
    }
}

void watch_remove(const struct nbdqueue *q, struct member *m)
{
    if (m->socket < 0)
        return;
    if (m->events != 0 && is_ours(q))
        (void)change(q, m->socket, m->events, 0);
    m->socket = -1;
    m->events = 0;
}

void watch_end(struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++)
        watch_remove(q, &q->members[i]);
    if (q->timer >= 0)
        close(q->timer);
    if (q->epoll >= 0)
        close(q->epoll);
    q->timer = q->epoll = -1;
}
