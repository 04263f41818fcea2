// SPDX-License-Identifier: LGPL-2.0-or-later
/* A queue of requests, and which thread moves it when; see queue.h, and queue_internal.h. */

#include "queue.h"
#include "journal.h"
#include "pieces.h"
#include "watch.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* The interval at which a queue that never sleeps runs signal handlers. */
#define HANDLER_INTERVAL (20 * NBDSHIM_MILLISECOND)
/* The time after which a step ends, even if there is more to do. */
#define MAX_STEP_SECONDS 0.001

/* The results of `move`, besides refusals. */
enum { IDLE, HAS_MOVED, INTERRUPTED };

/* Put all slots into the lists of free ones. */
static void free_all_slots(struct nbdqueue *q)
{
    q->free = q->reserved = NULL;
    for (unsigned i = 0; i < q->slot_count; i++) {
        struct slot *slot = &q->slots[i];
        struct slot **list = i < q->depth ? &q->free : &q->reserved;

        slot->q = q;
        slot->is_reserved = i >= q->depth;
        slot->next = *list;
        *list = slot;
    }
}

struct nbdqueue *nbdqueue_create(unsigned depth, uint32_t piece, uintptr_t token)
{
    struct nbdqueue *q = calloc(1, sizeof *q);

    if (q == NULL)
        return NULL;
    q->slots = calloc(depth, sizeof *q->slots);
    q->closure = calloc(1, sizeof *q->closure);
    q->wakeup_fd = -1;
    if (q->slots != NULL && q->closure != NULL && pthread_mutex_init(&q->lock, NULL) == 0)
        q->wakeup_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->wakeup_fd < 0) { /* errno is that of the call that failed; free preserves it */
        free(q->slots);
        free(q->closure);
        free(q);
        return NULL;
    }
    (void)sem_init(&q->turn, 0, 1);
    atomic_init(&q->references, 1);
    q->slot_count = q->depth = depth;
    q->journal.last = &q->journal.first;
    q->piece = piece;
    q->epoll = q->timer = -1;
    q->forks = atomic_load(&nbdshim_forks);
    q->closure->token = token;
    q->last_queued = &q->queued;
    q->last_done = &q->done;
    for (size_t i = 0; i < 2; i++)
        q->endpoints[i] = (struct endpoint){.file.fd = -1, .minimum = 1};
    free_all_slots(q);
    return q;
}

int nbdqueue_make(struct nbdqueue **made, unsigned depth, uint32_t piece, uintptr_t token)
{
    *made = nbdqueue_create(depth, piece, token);
    return *made != NULL ? 0 : errno;
}

/* One of the server's block size constraints, or 0. */
static uint32_t constraint(struct nbdshim *s, int which)
{
#ifdef LIBNBD_HAVE_NBD_GET_BLOCK_SIZE
    int64_t size = nbd_get_block_size(s->h, which);

    return size > 0 && size <= UINT32_MAX ? (uint32_t)size : 0;
#else
    (void)s, (void)which;
    return 0;
#endif
}

void nbdqueue_add_file(struct nbdqueue *q, enum nbdqueue_side side, int fd, uint64_t base,
                       uint64_t size)
{
    q->endpoints[side] = (struct endpoint){
        .file = {.fd = fd, .base = base}, .size = size, .minimum = 1, .has_zero = true};
}

void nbdqueue_add_null(struct nbdqueue *q, uint64_t size)
{
    q->endpoints[NBDQUEUE_TARGET] = (struct endpoint){
        .file.fd = -1, .size = size, .minimum = 1, .has_zero = true, .is_null = true};
}

void nbdqueue_set_sparse(struct nbdqueue *q, uint32_t block, bool target_is_zero)
{
    q->sparse = block;
    q->target_is_zero = target_is_zero;
}

int nbdqueue_set_reconnect(struct nbdqueue *q, enum nbdqueue_side side, uint64_t bound)
{
    if (q == NULL)
        return NBDSHIM_CLOSED;
    if (q->slot_count == q->depth) {
        unsigned count = q->depth + RESERVED_SLOTS;
        struct slot *slots = calloc(count, sizeof *slots);

        if (slots == NULL)
            return NBDSHIM_NO_MEMORY;
        free(q->slots);
        q->slots = slots;
        q->slot_count = count;
        free_all_slots(q);
    }
    q->endpoints[side].can_reconnect = true;
    if (side == NBDQUEUE_TARGET) {
        q->journal.bound = q->journal.limit = bound;
        q->journal.flush =
            (struct request){.operation = NBDQUEUE_FLUSH, .stop = 1, .origin = OF_JOURNAL};
        q->journal.part_flush =
            (struct request){.operation = NBDQUEUE_FLUSH, .stop = 1, .origin = OF_REPLAY};
        q->journal.part = UINT64_MAX;
    }
    return 0;
}

uint64_t nbdqueue_size(const struct nbdqueue *q, enum nbdqueue_side side)
{
    return q == NULL ? 0 : q->endpoints[side].size;
}

uint32_t nbdqueue_minimum(const struct nbdqueue *q, enum nbdqueue_side side)
{
    return q == NULL ? 0 : q->endpoints[side].minimum;
}

double nbdqueue_last_moved(const struct nbdqueue *q)
{
    int64_t last = q == NULL ? 0 : atomic_load_explicit(&q->last_moved, memory_order_relaxed);

    return (double)last / (double)NBDSHIM_SECOND;
}

/* Whether a queue was destroyed, or belongs to the parent of this forked process. */
static bool is_unusable(const struct nbdqueue *q)
{
    return q == NULL || nbdqueue_is_inherited(q);
}

/* Start to use the handles that were added meanwhile.  The caller has the turn. */
static void take_over(struct nbdqueue *q)
{
    /* Acquire: add_member filled the members in before it increased q->added. */
    size_t added = atomic_load_explicit(&q->added, memory_order_acquire);

    if (added != atomic_load_explicit(&q->count, memory_order_relaxed))
        atomic_store(&q->count, added);
}

/* Whether slots still refer to a handle, in flight or with an error that its loss explains. */
static bool is_in_use(const struct nbdqueue *q, const struct member *m)
{
    bool is_in_use = m->in_flight > 0;

    for (unsigned i = 0; i < q->slot_count && !is_in_use; i++)
        is_in_use = q->slots[i].is_listed && q->slots[i].member == m;
    return is_in_use;
}

/* The place of a handle of a side that was lost and is not in use any more; NULL if none. */
static struct member *lost_member(struct nbdqueue *q, enum nbdqueue_side side)
{
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (m->side == side && m->is_lost && !is_in_use(q, m))
            return m;
    }
    return NULL;
}

/*
 * Give the places of lost handles to those that were added for them.  The caller has the turn, and
 * has not entered any handle.
 */
static void replace_lost(struct nbdqueue *q)
{
    struct nbdshim *old[NBDQUEUE_MAX_HANDLES];
    size_t replaced = 0, left = 0;

    pthread_mutex_lock(&q->lock);
    for (size_t i = 0; i < q->joining_count; i++) {
        struct member *m = lost_member(q, q->joining[i].side);

        if (m == NULL) {
            q->joining[left++] = q->joining[i];
            continue;
        }
        watch_remove(q, m);
        old[replaced++] = m->s;
        m->s = q->joining[i].s;
        m->error = 0;
        m->is_lost = m->is_shared = false;
        m->is_new = true;
        if (m->side == NBDQUEUE_TARGET)
            journal_interrupt(q, false);
    }
    q->joining_count = left;
    pthread_mutex_unlock(&q->lock);
    while (replaced > 0)
        nbdshim_unref(old[--replaced]);
}

/*
 * Enter all handles, including those that were added meanwhile; closed ones are lost.  The caller
 * has the turn.  Returns 0, or NBDSHIM_REENTERED without having entered any.
 */
static int enter_all(struct nbdqueue *q)
{
    take_over(q);
    if (q->joining_count > 0)
        replace_lost(q);
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];
        int ret = nbdshim_enter(m->s);

        m->is_entered = ret == 0;
        if (ret == NBDSHIM_CLOSED || (m->is_new && watch_add(q, m) != 0))
            pieces_mark_lost(q, m, ENOTCONN);
        if (ret != NBDSHIM_REENTERED) {
            m->is_new = false;
            continue;
        }
        while (i-- > 0) {
            if (q->members[i].is_entered)
                nbdshim_leave(q->members[i].s);
            q->members[i].is_entered = false;
        }
        return ret;
    }
    return 0;
}

/* Prepare for the event loop to sleep, or wake it if there is something to report. */
static void let_loop_sleep(struct nbdqueue *q)
{
    watch_update(q);
    pthread_mutex_lock(&q->lock);
    /*
     * Under one lock: a slot that is answered before this is seen here, and a later one finds
     * is_sleeping set and writes to the eventfd.
     */
    q->is_sleeping = q->epoll >= 0;
    if (q->answered != NULL || q->done_length > q->reported || q->is_woken)
        nbdqueue_wake_poll(q);
    pthread_mutex_unlock(&q->lock);
}

/*
 * Give the turn back, and then leave the handles.  The order matters: leaving releases tokens, and
 * the upcall `release` may use the queue and would wait for the turn of its own thread.
 */
static void give_back_turn(struct nbdqueue *q)
{
    struct nbdshim *entered[NBDQUEUE_MAX_HANDLES];
    size_t count = 0;

    if (q->epoll >= 0)
        let_loop_sleep(q);
    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].is_entered)
            entered[count++] = q->members[i].s;
        q->members[i].is_entered = false;
    }
    /*
     * From here on another thread may have the turn, and q->members belongs to it.  So this thread
     * uses its own list; the calls that it has counted keep the handles open.
     */
    sem_post(&q->turn);
    while (count > 0)
        nbdshim_leave(entered[--count]);
}

/*
 * Describe the export of a handle that this thread has entered.  Returns 0, -1 if libnbd fails, or
 * NBDSHIM_TOO_LARGE.
 */
static int ask_export(struct endpoint *export, struct nbdshim *s)
{
    int64_t size = nbdshim_number(nbd_get_size(s->h), "nbd_get_size");
    uint32_t minimum = constraint(s, LIBNBD_SIZE_MINIMUM);

    if (size < 0)
        return size == -1 ? -1 : NBDSHIM_TOO_LARGE;
    *export = (struct endpoint){.size = (uint64_t)size,
                                .minimum = (minimum & (minimum - 1)) == 0 ? minimum : 1,
                                .maximum = constraint(s, LIBNBD_SIZE_MAXIMUM),
                                .has_zero = nbd_can_zero(s->h) == 1,
                                .can_flush = nbd_can_flush(s->h) == 1};
    if (export->minimum == 0)
        export->minimum = 1;
    return 0;
}

/* Before the first request: limit an endpoint to what a new handle can do.  q->lock is locked. */
static void narrow(struct endpoint *endpoint, const struct endpoint *export)
{
    if (endpoint->count == 0 || export->size < endpoint->size)
        endpoint->size = export->size;
    if (export->minimum > endpoint->minimum)
        endpoint->minimum = export->minimum;
    if (export->maximum != 0 && (endpoint->maximum == 0 || export->maximum < endpoint->maximum))
        endpoint->maximum = export->maximum;
    endpoint->has_zero = export->has_zero && (endpoint->count == 0 || endpoint->has_zero);
    endpoint->can_flush = export->can_flush && (endpoint->count == 0 || endpoint->can_flush);
}

/* After the first request: whether a new handle can do everything that the endpoint can. */
static bool fits(const struct endpoint *endpoint, const struct endpoint *export)
{
    bool has_maximum =
        export->maximum == 0 || (endpoint->maximum != 0 && export->maximum >= endpoint->maximum);

    return export->size == endpoint->size && export->minimum == endpoint->minimum && has_maximum &&
           (export->has_zero || !endpoint->has_zero) && (export->can_flush || !endpoint->can_flush);
}

/* Whether a new handle of a side takes the place of a lost one.  q->lock is locked. */
static bool is_substitute(const struct nbdqueue *q, enum nbdqueue_side side)
{
    size_t lost = 0, joining = 0;

    if (!q->endpoints[side].can_reconnect)
        return false;
    for (size_t i = 0; i < q->added; i++)
        lost += q->members[i].side == side && q->members[i].is_lost;
    for (size_t i = 0; i < q->joining_count; i++)
        joining += q->joining[i].side == side;
    return joining < lost;
}

/* Give a handle a place among the members, or have it take the place of a lost one. */
static void place(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s)
{
    if (is_substitute(q, side)) {
        q->joining[q->joining_count].s = s;
        q->joining[q->joining_count].side = side;
        q->joining_count++;
        return;
    }
    q->endpoints[side].count++;
    q->members[q->added] = (struct member){.s = s, .side = side, .socket = -1, .is_new = true};
    if (side == NBDQUEUE_TARGET && q->is_started)
        journal_interrupt(q, false);
    atomic_fetch_add(&q->added, 1); /* publishes the member, which is complete now */
}

/* Add a handle to a side.  Returns 0 or a refusal. */
static int add_member(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s,
                      const struct endpoint *export)
{
    struct endpoint *endpoint = &q->endpoints[side];
    int ret = 0;

    pthread_mutex_lock(&q->lock);
    if (q->is_dropped)
        ret = NBDSHIM_CLOSED;
    else if (q->added == NBDQUEUE_MAX_HANDLES && !is_substitute(q, side))
        ret = NBDSHIM_TOO_MANY;
    else if (q->is_started && !fits(endpoint, export))
        ret = NBDSHIM_OTHER_EXPORT;
    if (ret == 0) {
        if (!q->is_started)
            narrow(endpoint, export);
        atomic_fetch_add(&s->references, 1);
        place(q, side, s);
        q->has_news = true;
        nbdqueue_wake_poll(q);
    }
    pthread_mutex_unlock(&q->lock);
    return ret;
}

int nbdqueue_add(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s)
{
    struct endpoint export;
    int ret;

    if (is_unusable(q))
        return NBDSHIM_CLOSED;
    ret = nbdshim_enter(s);
    if (ret != 0)
        return ret;
    ret = ask_export(&export, s);
    if (ret == 0)
        ret = add_member(q, side, s, &export);
    nbdshim_leave(s);
    if (ret == 0 && sem_trywait(&q->turn) == 0) {
        (void)enter_all(q);
        give_back_turn(q);
    }
    return ret;
}

/* Whether this thread is inside a callback of one of the handles, where it holds libnbd's lock. */
static bool is_reentry(const struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        if (nbdshim_is_reentry(q->members[i].s))
            return true;
    }
    return false;
}

/*
 * Run signal handlers.  Returns 0, NBDSHIM_STOPPED, or NBDSHIM_CLOSED in a child that one of them
 * has forked: the queue belongs to the parent.
 */
static int run_handlers(struct nbdqueue *q)
{
    bool has_forked;
    int ret = nbdshim_run_handlers(&has_forked);

    for (size_t i = 0; has_forked && i < q->count; i++)
        nbdshim_disconnect_child(q->members[i].s);
    return has_forked && ret == 0 ? NBDSHIM_CLOSED : ret;
}

/* Wait for the queue's turn.  Returns 0, NBDSHIM_TIMED_OUT, or as run_handlers. */
static int take_turn(struct nbdqueue *q, int64_t until)
{
    while (sem_trywait(&q->turn) != 0) {
        int ret;

        if (nbdshim_wait_for_turn(&q->turn, until))
            break;
        if (nbdshim_slice(until) == 0)
            return NBDSHIM_TIMED_OUT;
        ret = run_handlers(q);
        if (ret != 0)
            return ret;
    }
    q->handlers_due = nbdshim_deadline((double)HANDLER_INTERVAL / (double)NBDSHIM_SECOND);
    return 0;
}

/*
 * Run signal handlers without the turn, because they may use the queue and its handles.  Returns 0,
 * or as run_handlers; then this thread does not have the turn any more.
 */
static int pause_for_handlers(struct nbdqueue *q)
{
    int ret;

    give_back_turn(q);
    ret = run_handlers(q);
    if (ret != 0)
        return ret;
    ret = take_turn(q, NBDSHIM_NEVER);
    if (ret == 0)
        (void)enter_all(q); /* not refused: this thread is not inside a callback */
    return ret;
}

/*
 * Take the turns of the handles that have commands in flight, or of all handles if an event loop
 * watches them or a slot is blocked.  Returns whether another thread has one of them.
 */
static bool take_member_turns(struct nbdqueue *q)
{
    bool is_missing = false;

    pthread_mutex_lock(&q->lock);
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (!m->is_entered || m->is_lost)
            continue;
        if (m->in_flight == 0 && q->epoll < 0 && q->blocked == NULL)
            continue;
        /* Do not block on it, since this thread has the queue's turn; and let waiters go first. */
        m->has_turn = atomic_load(&m->s->waiters) == 0 && sem_trywait(&m->s->turn) == 0;
        m->is_shared = !m->has_turn;
        is_missing |= m->is_shared;
    }
    pthread_mutex_unlock(&q->lock);
    return is_missing;
}

/* Give back the turns that take_member_turns has taken. */
static void give_back_member_turns(struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].has_turn)
            sem_post(&q->members[i].s->turn);
        q->members[i].has_turn = false;
    }
}

/* The descriptor and the events to poll for a handle. */
static struct pollfd poll_of(struct nbdqueue *q, struct member *m)
{
    struct pollfd fd = {.fd = -1};
    unsigned direction = m->has_turn ? nbd_aio_get_direction(m->s->h) : 0;

    if (m->has_turn && direction == 0)
        pieces_mark_lost(q, m, ENOTCONN);
    if (direction != 0)
        fd.fd = nbdshim_socket_of(m->s);
    if (direction & LIBNBD_AIO_DIRECTION_READ)
        fd.events |= POLLIN;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        fd.events |= POLLOUT;
    return fd;
}

/* Sleep in poll for at most `longest` nanoseconds.  Returns its result. */
static int sleep_in_poll(struct nbdqueue *q, struct pollfd *fds, nfds_t count, int64_t longest)
{
    int ready;

    /*
     * Other threads change these under q->lock.  What they changed before is seen here; for what
     * they change later, they find is_sleeping set and write to the eventfd, which ends the poll.
     */
    pthread_mutex_lock(&q->lock);
    if (q->answered != NULL || q->has_news || q->is_woken || q->is_dropped)
        longest = 0;
    q->has_news = false;
    q->is_sleeping = longest != 0;
    pthread_mutex_unlock(&q->lock);
    ready = poll(fds, count, (int)((longest + NBDSHIM_MILLISECOND - 1) / NBDSHIM_MILLISECOND));
    pthread_mutex_lock(&q->lock);
    q->is_sleeping = false;
    pthread_mutex_unlock(&q->lock);
    return ready;
}

/* Notify libnbd of the events that poll returned, at the time `now`. */
static void notify_all(struct nbdqueue *q, const struct pollfd *fds, int64_t now)
{
    uint64_t count;

    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (!m->has_turn || fds[i].revents == 0)
            continue;
        atomic_store_explicit(&q->last_moved, now, memory_order_relaxed);
        if (nbdshim_notify(m->s, fds[i].revents) == -1 &&
            (nbd_aio_is_dead(m->s->h) == 1 || nbd_aio_is_closed(m->s->h) == 1))
            pieces_mark_lost(q, m, nbd_get_errno());
    }
    /* Reset the eventfd: whatever it announced is found by the caller, which has the turn. */
    if (fds[q->count].revents != 0)
        (void)!read(q->wakeup_fd, &count, sizeof count);
}

/* Enter the handles that were added since this thread took the turn. */
static void enter_new(struct nbdqueue *q)
{
    size_t before = q->count;

    take_over(q);
    for (size_t i = before; i < q->count; i++) {
        struct member *m = &q->members[i];

        m->is_entered = nbdshim_enter(m->s) == 0;
        m->is_new = false;
        if (!m->is_entered || watch_add(q, m) != 0)
            pieces_mark_lost(q, m, ENOTCONN);
    }
}

/*
 * Move the queue: wait for the sockets for at most `longest` nanoseconds, notify libnbd, and reap.
 * The caller has the turn.  Returns HAS_MOVED; IDLE if nothing has happened; INTERRUPTED if a
 * signal ended the poll; or, without the turn, a refusal of pause_for_handlers.
 */
static int move(struct nbdqueue *q, int64_t longest)
{
    struct pollfd fds[NBDQUEUE_MAX_HANDLES + 1];
    bool is_shared;
    int64_t now;
    int ready, ret;

    /* Only the thread with the turn changes q->count, so fds has the same members throughout. */
    enter_new(q);
    is_shared = take_member_turns(q);
    for (size_t i = 0; i < q->count; i++)
        fds[i] = poll_of(q, &q->members[i]);
    fds[q->count] = (struct pollfd){.fd = q->wakeup_fd, .events = POLLIN};
    /*
     * The thread that moves a shared handle does not know about this queue.  `complete` wakes us
     * for our replies, but nothing does when that thread gives the turn back: so try again soon.
     */
    if (is_shared && longest > SHARED_RETRY_INTERVAL)
        longest = SHARED_RETRY_INTERVAL;
    /*
     * With the turns of the handles, no other thread can read from their sockets between this poll
     * and the notification: see wait.h.
     */
    ready = sleep_in_poll(q, fds, q->count + 1, longest);
    now = nbdshim_now();
    /* Only saves clock reads: `complete` need not read the time while notify_all has noted it. */
    atomic_store_explicit(&q->is_moving, true, memory_order_relaxed);
    if (ready > 0)
        notify_all(q, fds, now);
    atomic_store_explicit(&q->is_moving, false, memory_order_relaxed);
    /* Before pieces_reap, so that waiting calls need not wait while it copies and writes data. */
    give_back_member_turns(q);
    ret = pieces_reap(q) || ready > 0 ? HAS_MOVED : ready < 0 ? INTERRUPTED : IDLE;
    if (ready < 0 || now >= q->handlers_due || q->joining_count > 0) {
        int stopped = pause_for_handlers(q); /* gives the turn back, and takes it again */

        return stopped != 0 ? stopped : ret;
    }
    return ret;
}

/* Whether a wait is over for another reason than its timeout. */
static bool is_over(struct nbdqueue *q, unsigned enough)
{
    bool is_over;

    pthread_mutex_lock(&q->lock);
    is_over =
        q->done_length >= enough || q->done_length == q->length || q->is_woken || q->is_dropped;
    pthread_mutex_unlock(&q->lock);
    return is_over;
}

/* Report requests that are done, at most `capacity`.  Returns how many, or NBDSHIM_CLOSED. */
static int report(struct nbdqueue *q, struct nbdqueue_done *done, int capacity)
{
    const struct request *r;
    int count = 0;

    pthread_mutex_lock(&q->lock);
    for (r = q->done; r != NULL && count < capacity; r = r->next) {
        done[count++] = (struct nbdqueue_done){.token = r->token,
                                               .serial = r->serial,
                                               .offset = r->error_offset,
                                               .length = r->error_length,
                                               .moved = r->moved,
                                               .zeroed = r->zeroed,
                                               .error = r->error,
                                               .side = (int)r->error_side,
                                               .command = (int)r->error_command};
    }
    q->reported = (unsigned)count;
    q->is_woken = false;
    if (q->is_dropped)
        count = NBDSHIM_CLOSED;
    pthread_mutex_unlock(&q->lock);
    return count;
}

/* The handle whose call in this thread will release the queue's token when it ends. */
static struct nbdshim *releaser(const struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        if (nbdshim_is_reentry(q->members[i].s))
            return q->members[i].s;
    }
    return q->count > 0 ? q->members[0].s : NULL;
}

/* Close the descriptors of a dropped queue.  The caller has the turn, so no thread polls them. */
static void close_descriptors(struct nbdqueue *q)
{
    int wakeup_fd;

    watch_end(q);
    /* Threads without the turn write to it, but only under q->lock and if it is not -1. */
    pthread_mutex_lock(&q->lock);
    wakeup_fd = q->wakeup_fd;
    q->wakeup_fd = -1;
    pthread_mutex_unlock(&q->lock);
    if (wakeup_fd >= 0)
        close(wakeup_fd);
}

/* Free all requests, give the turn back, and release the queue's token if that is possible now. */
static void forget_and_leave(struct nbdqueue *q)
{
    pieces_forget(q, releaser(q));
    close_descriptors(q);
    give_back_turn(q);
    if (!is_reentry(q))
        nbdshim_release_tokens(releaser(q));
}

int nbdqueue_wait(struct nbdqueue *q, struct nbdqueue_done *done, int capacity, int min_done,
                  double timeout)
{
    int64_t until = nbdshim_deadline(timeout);
    unsigned enough = min_done > 0 ? (unsigned)min_done : 0;
    int ret;

    if (is_unusable(q))
        return NBDSHIM_CLOSED;
    ret = is_reentry(q) ? NBDSHIM_REENTERED : take_turn(q, until);
    if (ret == NBDSHIM_TIMED_OUT)
        return 0;
    if (ret != 0)
        return ret;
    ret = enter_all(q);
    if (ret == 0) {
        /*
         * Reap before the first sleep: calls in other threads may have received replies for this
         * queue.  Reaping frees slots, so pump afterwards.
         */
        (void)pieces_reap(q);
        pieces_pump(q);
        while (!is_over(q, enough)) {
            ret = move(q, nbdshim_slice(until));
            if (ret < 0)
                return ret; /* move has given the turn back and left the handles */
            pieces_pump(q);
            /*
             * A timeout of 0 continues as long as there is something to move without sleeping; a
             * longer one ends on time even then.  After an interrupted poll nothing is known about
             * the sockets, so look at least once more.
             */
            if ((ret == IDLE || (ret == HAS_MOVED && timeout > 0)) && nbdshim_slice(until) == 0)
                break;
        }
        ret = report(q, done, capacity);
    }
    /*
     * A thread that drops the queue inside a callback cannot take the turn, and leaves the rest to
     * the thread that has it: this one.
     */
    if (ret == NBDSHIM_CLOSED)
        forget_and_leave(q);
    else
        give_back_turn(q);
    return ret;
}

int nbdqueue_fd(struct nbdqueue *q)
{
    int ret;

    if (is_unusable(q))
        return NBDSHIM_CLOSED;
    if (is_reentry(q))
        return NBDSHIM_REENTERED;
    ret = take_turn(q, NBDSHIM_NEVER);
    if (ret != 0)
        return ret;
    ret = enter_all(q);
    if (ret == 0 && q->wakeup_fd < 0)
        ret = NBDSHIM_CLOSED; /* it was dropped */
    if (ret == 0)
        ret = q->epoll >= 0 ? q->epoll : watch_begin(q);
    give_back_turn(q);
    return ret;
}

int nbdqueue_step(struct nbdqueue *q, struct nbdqueue_done *done, int capacity)
{
    int64_t until = nbdshim_deadline(MAX_STEP_SECONDS);
    int ret;

    if (is_unusable(q))
        return NBDSHIM_CLOSED;
    if (is_reentry(q))
        return NBDSHIM_REENTERED;
    if (sem_trywait(&q->turn) != 0)
        return 0; /* its holder wakes the event loop when it gives the turn back */
    q->handlers_due = NBDSHIM_NEVER; /* the event loop runs signal handlers itself */
    ret = enter_all(q);
    if (ret == 0) {
        watch_stop_timer(q);
        (void)pieces_reap(q);
        do {
            pieces_pump(q);
            ret = move(q, 0);
        } while (ret > IDLE && nbdshim_slice(until) != 0);
        if (ret < 0)
            return ret; /* move has given the turn back and left the handles */
        pieces_pump(q);
        ret = report(q, done, capacity);
    }
    if (ret == NBDSHIM_CLOSED)
        forget_and_leave(q);
    else
        give_back_turn(q);
    return ret;
}

void nbdqueue_cancel(struct nbdqueue *q, uintptr_t token)
{
    if (is_unusable(q))
        return;
    pthread_mutex_lock(&q->lock);
    for (struct request *r = q->queued; r != NULL; r = r->next) {
        if (r->token != token || r->cut == r->stop)
            continue;
        r->cut = r->stop;
        if (r->error == 0) {
            r->error = ECANCELED;
            r->error_offset = r->start;
            r->error_length = r->stop - r->start;
        }
    }
    pieces_cancel(q, token);
    nbdqueue_wake_poll(q);
    pthread_mutex_unlock(&q->lock);
}

/* Remove a request from q->done, if it is there, and free it.  q->lock is locked. */
static void take(struct nbdqueue *q, uint64_t serial)
{
    struct request **link = &q->done, *r;

    while (*link != NULL && (*link)->serial != serial) /* usually it is the first */
        link = &(*link)->next;
    r = *link;
    if (r == NULL)
        return;
    *link = r->next;
    if (r->next == NULL)
        q->last_done = link;
    q->done_length--;
    q->length--;
    if (q->reported > 0)
        q->reported--;
    free(r);
}

void nbdqueue_take(struct nbdqueue *q, const struct nbdqueue_done *done, int count)
{
    if (is_unusable(q))
        return;
    pthread_mutex_lock(&q->lock);
    for (int i = 0; i < count; i++)
        take(q, done[i].serial);
    pthread_mutex_unlock(&q->lock);
}

int nbdqueue_submit(struct nbdqueue *q, enum nbdqueue_operation operation, uintptr_t token,
                    char *buffer, uint64_t length, uint64_t offset, uint32_t flags)
{
    struct request *r;

    if (is_unusable(q))
        return NBDSHIM_CLOSED;
    if (is_reentry(q))
        return NBDSHIM_REENTERED;
    r = malloc(sizeof *r);
    if (r == NULL)
        return NBDSHIM_NO_MEMORY;
    *r = (struct request){.operation = operation,
                          .token = token,
                          .buffer = buffer,
                          .start = offset,
                          .cut = offset,
                          .stop = offset + length,
                          .error_command = operation,
                          .flags = flags};
    /* Nobody else knows r yet, so this needs no lock. */
    r->error = pieces_check(q, r);
    if (r->error != 0) {
        r->error_offset = offset;
        r->error_length = length;
        r->cut = r->stop;
    }
    pthread_mutex_lock(&q->lock);
    if (q->is_dropped) {
        pthread_mutex_unlock(&q->lock);
        free(r);
        return NBDSHIM_CLOSED;
    }
    /*
     * This may make q->piece smaller, without the turn.  It is safe because there are no requests:
     * the thread with the turn reads q->piece only for a request, and r is not in the list yet.
     */
    if (q->length == 0 && q->in_flight == 0)
        pieces_choose_size(q);
    q->is_started = true;
    r->serial = ++q->serial;
    *q->last_queued = r;
    q->last_queued = &r->next;
    q->length++;
    pthread_mutex_unlock(&q->lock);
    /*
     * From here on r belongs to the queue: another thread may send, finish and take it at any time.
     * If nobody has the turn, send its commands in this thread, so that the server works on them
     * before anybody waits.
     */
    if (sem_trywait(&q->turn) == 0) {
        if (enter_all(q) == 0)
            pieces_pump(q);
        give_back_turn(q);
    } else {
        /*
         * The thread with the turn may have pumped before r was in the list, and may be about to
         * sleep.  It reads has_news and sets is_sleeping under the lock: so it either sees the news
         * and does not sleep, or is woken here.  If it has given the turn back by now, the next
         * thread that takes it pumps before it sleeps.
         */
        pthread_mutex_lock(&q->lock);
        q->has_news = true;
        nbdqueue_wake_poll(q);
        pthread_mutex_unlock(&q->lock);
    }
    return 0;
}

void nbdqueue_wake(struct nbdqueue *q)
{
    if (is_unusable(q))
        return;
    pthread_mutex_lock(&q->lock);
    q->is_woken = true;
    nbdqueue_wake_poll(q);
    pthread_mutex_unlock(&q->lock);
}

int nbdqueue_error(const struct nbdqueue *q, const struct nbdshim *s)
{
    for (size_t i = 0; !is_unusable(q) && i < q->count; i++) {
        if (q->members[i].s == s)
            return q->members[i].error;
    }
    return 0;
}

unsigned nbdqueue_losses(const struct nbdqueue *q)
{
    return q == NULL ? 0 : q->losses;
}

uint64_t nbdqueue_answers(const struct nbdqueue *q, enum nbdqueue_side side)
{
    return q == NULL ? 0 : q->endpoints[side].answers;
}

void nbdqueue_give_up(struct nbdqueue *q, enum nbdqueue_side side, int error)
{
    if (is_unusable(q))
        return;
    pthread_mutex_lock(&q->lock);
    q->endpoints[side].error = error;
    q->has_news = true;
    nbdqueue_wake_poll(q);
    pthread_mutex_unlock(&q->lock);
    /* If nobody has the turn, the next call fails the commands that wait. */
    if (!is_reentry(q) && sem_trywait(&q->turn) == 0) {
        if (enter_all(q) == 0)
            pieces_pump(q);
        give_back_turn(q);
    }
}

unsigned nbdqueue_length(struct nbdqueue *q)
{
    unsigned length;

    if (is_unusable(q))
        return 0;
    pthread_mutex_lock(&q->lock);
    length = q->length;
    pthread_mutex_unlock(&q->lock);
    return length;
}

uint64_t nbdqueue_copied(struct nbdqueue *q)
{
    return q == NULL ? 0 : atomic_load_explicit(&q->copied, memory_order_relaxed);
}

uint64_t nbdqueue_zeroed(struct nbdqueue *q)
{
    return q == NULL ? 0 : atomic_load_explicit(&q->zeroed, memory_order_relaxed);
}

uint64_t nbdqueue_read(struct nbdqueue *q)
{
    return q == NULL ? 0 : atomic_load_explicit(&q->read, memory_order_relaxed);
}

uint64_t nbdqueue_written(struct nbdqueue *q)
{
    return q == NULL ? 0 : atomic_load_explicit(&q->written, memory_order_relaxed);
}

/* Mark a queue as dropped, and end the wait of another thread.  Returns false if it was dropped. */
static bool mark_dropped(struct nbdqueue *q)
{
    bool was_dropped;

    pthread_mutex_lock(&q->lock);
    was_dropped = q->is_dropped;
    q->is_dropped = true;
    nbdqueue_wake_poll(q);
    pthread_mutex_unlock(&q->lock);
    return !was_dropped;
}

/* Take the turn of a dropped queue: the thread that has it gives it back at once. */
static void take_last_turn(struct nbdqueue *q)
{
    while (sem_wait(&q->turn) != 0)
        ; /* a signal interrupted it */
}

/* Close a descriptor, if there is one, and forget it. */
static void close_one(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* In a forked child: close its copies of the descriptors, and leave everything else alone. */
static void close_inherited(struct nbdqueue *q)
{
    close_one(&q->wakeup_fd);
    close_one(&q->epoll);
    close_one(&q->timer);
}

void nbdqueue_drop(struct nbdqueue *q)
{
    if (q != NULL && nbdqueue_is_inherited(q))
        close_inherited(q);
    /*
     * Inside a callback of one of the handles this thread may already have the turn, below on its
     * stack.  It only marks the queue then, and the call that has the turn frees the requests.
     */
    if (is_unusable(q) || !mark_dropped(q) || is_reentry(q))
        return;
    take_last_turn(q);
    (void)enter_all(q);
    forget_and_leave(q);
}

bool nbdqueue_uses(struct nbdqueue *q, uintptr_t token)
{
    bool is_used;

    if (is_unusable(q))
        return true; /* a forked child cannot know */
    pthread_mutex_lock(&q->lock);
    is_used = !q->is_forgotten;
    for (unsigned i = 0; i < q->slot_count; i++)
        is_used |= q->slots[i].is_in_flight && q->slots[i].token == token;
    pthread_mutex_unlock(&q->lock);
    return is_used;
}

void nbdqueue_destroy(struct nbdqueue *q)
{
    if (is_unusable(q)) {
        nbdqueue_drop(q);
        return;
    }
    (void)mark_dropped(q);
    take_last_turn(q);
    (void)enter_all(q);
    forget_and_leave(q);
    pieces_unref(q);
}
