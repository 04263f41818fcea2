// SPDX-License-Identifier: LGPL-2.0-or-later
/* How requests become pieces and commands, and how these end; see pieces.h. */

#include "pieces.h"
#include "buffer.h"
#include "journal.h"
#include "watch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* The largest piece of a request without data: zero, trim or cache. */
#define MAX_RANGE (UINT64_C(128) << 20)
/* O_DIRECT needs memory aligned to the blocks of the device; none are larger than this. */
#define ALIGNMENT 4096

/*
 * Put a slot whose command has ended into q->answered, for pieces_reap.  q->lock is locked.  Any
 * thread may do this; a forgotten queue has nobody who reaps.
 */
static void list_answered(struct slot *slot)
{
    struct nbdqueue *q = slot->q;

    if (slot->is_listed || q->is_forgotten)
        return;
    slot->is_listed = true;
    slot->next = q->answered;
    q->answered = slot;
    nbdqueue_wake_poll(q);
}

/*
 * libnbd's completion callback; returns 1 to retire the command.  A read is retired later by
 * nbd_aio_command_completed, because only that reports a reply which did not cover the whole range.
 */
// cppcheck-suppress constParameter ; libnbd has declared it
static int complete(void *user_data, int *error)
{
    struct slot *slot = user_data;
    struct nbdqueue *q = slot->q;
    int is_retired;

    if (nbdqueue_is_inherited(q))
        return 1;
    if (!atomic_load_explicit(&q->is_moving, memory_order_relaxed))
        nbdqueue_note_move(q); /* another thread moves this handle */
    pthread_mutex_lock(&q->lock);
    slot->is_answered = true;
    slot->error = *error;
    /*
     * A command that is retired here is listed in `retire`, which libnbd calls right afterwards.  A
     * read is listed now, and the thread that reaps retires it.  So is a command that ends while it
     * is being sent, as libnbd still uses it then.  Of a dropped queue nobody reaps.
     */
    is_retired = slot->is_issued && (q->is_dropped || slot->command != NBDQUEUE_READ);
    if (!is_retired)
        list_answered(slot);
    pthread_mutex_unlock(&q->lock);
    return is_retired;
}

/*
 * Release the queue's token when this thread leaves s.  The queue is forgotten and has no command
 * in flight, so nothing can use the buffers.  It would be too early for a queue that is only marked
 * as dropped: a piece may still be sent, or copied from a bounce buffer to its own.  q->lock is
 * locked.
 */
static void release_buffers(struct nbdqueue *q, struct nbdshim *s)
{
    struct nbdshim_closure *closure = q->closure;

    q->closure = NULL;
    if (closure == NULL || nbdshim_is_silent()) {
        free(closure);
        return;
    }
    closure->s = s;
    nbdshim_push_released(closure);
}

/* The number of bytes of memory that a command in flight uses. */
static size_t bytes_of(const struct slot *slot)
{
    bool has_data = slot->command == NBDQUEUE_READ || slot->command == NBDQUEUE_WRITE;

    return has_data ? slot->wide_length : 0;
}

void pieces_unref(struct nbdqueue *q)
{
    if (atomic_fetch_sub(&q->references, 1) != 1)
        return;
    for (unsigned i = 0; i < q->slot_count; i++)
        free(q->slots[i].bounce);
    watch_end(q);
    for (size_t i = 0, added = q->added; i < added; i++)
        nbdshim_unref(q->members[i].s);
    for (size_t i = 0; i < q->joining_count; i++)
        nbdshim_unref(q->joining[i].s);
    journal_free(q);
    if (q->wakeup_fd >= 0)
        close(q->wakeup_fd);
    pthread_mutex_destroy(&q->lock);
    sem_destroy(&q->turn);
    free(q->zeroes);
    free(q->closure);
    free(q->slots);
    free(q);
}

/* libnbd's `free` callback: libnbd does not use the slot any more. */
static void retire(void *user_data)
{
    struct slot *slot = user_data;
    struct nbdqueue *q = slot->q;
    struct nbdshim *s = slot->member->s;

    if (nbdqueue_is_inherited(q))
        return;
    pthread_mutex_lock(&q->lock);
    slot->is_in_flight = false;
    slot->member->in_flight--;
    q->in_flight--;
    if (slot->is_orphan)
        nbdshim_remove_orphan(s, &slot->range, bytes_of(slot));
    /*
     * libnbd also calls this inside nbd_aio_X if it refuses the command.  Then send_command is
     * still running, with neither bit set, and will list the slot itself with libnbd's error.
     */
    if (!slot->is_answered && slot->is_issued)
        slot->error = ENOTCONN; /* nbd_close has freed a command without a reply */
    if (slot->is_issued || slot->is_answered)
        list_answered(slot);
    if (q->is_forgotten && q->in_flight == 0)
        release_buffers(q, s);
    pthread_mutex_unlock(&q->lock);
    pieces_unref(q); /* the command's reference; q and its slots may be gone now */
}

/* Do a slot's command on a file.  Returns 0 or an errno. */
static int use_file(const struct slot *slot, struct queuefile *file)
{
    uint64_t at = slot->wide_offset, length = slot->wide_length;

    switch (slot->command) {
    case NBDQUEUE_READ:
        return queuefile_read(file, slot->data, length, at);
    case NBDQUEUE_WRITE:
        return queuefile_write(file, slot->data, length, at);
    case NBDQUEUE_ZERO:
        return queuefile_zero(file, length, at, slot->data, slot->q->piece);
    case NBDQUEUE_FLUSH:
        return queuefile_flush(file);
    default:
        return ENOTSUP;
    }
}

/* Whether a command changes the disk. */
static bool is_changing(enum nbdqueue_operation command)
{
    return command == NBDQUEUE_WRITE || command == NBDQUEUE_ZERO || command == NBDQUEUE_TRIM;
}

/* The number of bytes of memory that the commands in flight on a handle use. */
static size_t bytes_in_flight(const struct nbdqueue *q, const struct member *m)
{
    size_t sum = 0;

    for (unsigned i = 0; i < q->slot_count; i++) {
        const struct slot *slot = &q->slots[i];

        if (slot->is_in_flight && !slot->is_orphan && slot->member == m)
            sum += bytes_of(slot);
    }
    return sum;
}

/* Whether a handle can take another command: everything in flight may become orphans. */
static bool has_capacity(const struct slot *slot, const struct member *m)
{
    size_t bytes;

    if (atomic_load_explicit(&m->s->orphans, memory_order_relaxed) == 0)
        return true;
    bytes = bytes_in_flight(slot->q, m) + bytes_of(slot);
    return !nbdshim_is_full(m->s, m->in_flight, bytes);
}

/*
 * The handle of a side that has the fewest commands in flight.  Returns NULL if no handle can take
 * a command now; *is_alive says whether one may be able to later.  q->lock is locked.
 */
static struct member *choose_member(const struct slot *slot, enum nbdqueue_side side,
                                    bool *is_alive)
{
    struct nbdqueue *q = slot->q;
    struct member *found = NULL;

    *is_alive = false;
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (m->side != side || !m->is_entered || m->is_lost)
            continue;
        *is_alive = true;
        if ((found == NULL || m->in_flight < found->in_flight) && has_capacity(slot, m))
            found = m;
    }
    return found;
}

/* The errno for a command of a side that has lost all its connections, or was given up. */
static int lost_error(const struct nbdqueue *q, enum nbdqueue_side side)
{
    if (q->endpoints[side].error != 0)
        return q->endpoints[side].error;
    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].side == side && q->members[i].error != 0)
            return q->members[i].error;
    }
    return ENOTCONN;
}

/* Call libnbd for a slot's command.  Returns the cookie, or -1. */
static int64_t call(struct slot *slot)
{
    struct nbd_handle *h = slot->member->s->h;
    uint64_t at = slot->wide_offset, length = slot->wide_length;
    uint32_t flags = slot->request->flags;
    nbd_completion_callback done = {.callback = complete, .user_data = slot, .free = retire};

    if (slot->command == NBDQUEUE_READ)
        return nbd_aio_pread(h, slot->data, length, at, done,
                             slot->request->operation == NBDQUEUE_READ ? flags : 0);
    if (slot->command == NBDQUEUE_WRITE && slot->request->operation != NBDQUEUE_WRITE)
        flags &= LIBNBD_CMD_FLAG_FUA;
    switch (slot->command) {
    case NBDQUEUE_WRITE:
        return nbd_aio_pwrite(h, slot->data, length, at, done, flags);
    case NBDQUEUE_ZERO:
        return nbd_aio_zero(h, length, at, done, flags);
    case NBDQUEUE_TRIM:
        return nbd_aio_trim(h, length, at, done, flags);
    case NBDQUEUE_CACHE:
        return nbd_aio_cache(h, length, at, done, flags);
    default:
        return nbd_aio_flush(h, done, flags);
    }
}

static enum nbdqueue_side side_of(const struct slot *slot)
{
    bool is_first_of_copy =
        slot->request->operation == NBDQUEUE_COPY && slot->command == NBDQUEUE_READ;

    return is_first_of_copy ? NBDQUEUE_SOURCE : NBDQUEUE_TARGET;
}

static bool overlap(const struct slot *a, const struct slot *b)
{
    return a->wide_offset < b->wide_offset + b->wide_length &&
           b->wide_offset < a->wide_offset + a->wide_length;
}

/* Whether a command overlaps a cancelled change of this queue in flight.  q->lock is locked. */
static bool waits_for_cancelled(const struct slot *slot)
{
    const struct nbdqueue *q = slot->q;

    for (unsigned i = 0; q->cancelled > 0 && i < q->slot_count; i++) {
        const struct slot *other = &q->slots[i];

        if (other != slot && other->request != NULL && other->request->is_cancelled &&
            other->is_in_flight && is_changing(other->command) && side_of(other) == side_of(slot) &&
            overlap(other, slot))
            return true;
    }
    return false;
}

/* Whether a command overlaps what an orphan of one of the handles changes.  q->lock is locked. */
static bool waits_for_orphan(const struct slot *slot)
{
    const struct nbdqueue *q = slot->q;
    uint64_t from = slot->wide_offset, to = from + slot->wide_length;

    for (size_t i = 0; i < q->count; i++) {
        const struct member *m = &q->members[i];

        if (m->side == side_of(slot) && m->is_entered && nbdshim_is_changing(m->s, from, to))
            return true;
    }
    return false;
}

/* Whether a command has to wait for a change that nobody waits for any more.  q->lock is locked. */
static bool is_blocked(const struct slot *slot)
{
    return slot->command != NBDQUEUE_FLUSH && (waits_for_cancelled(slot) || waits_for_orphan(slot));
}

/* Whether lost connections of a side are replaced, and somebody still tries to. */
static bool is_awaited(const struct nbdqueue *q, enum nbdqueue_side side)
{
    return q->endpoints[side].can_reconnect && q->endpoints[side].error == 0;
}

/*
 * Whether a command has to wait until the changes of the journal are made again.  An interrupted
 * replay makes none.
 */
static bool waits_for_replay(const struct slot *slot)
{
    const struct journal *j = &slot->q->journal;

    return j->is_due && slot->request->origin != OF_REPLAY && side_of(slot) == NBDQUEUE_TARGET;
}

/* Whether the replay of which a slot is a part was interrupted. */
static bool is_outdated(const struct slot *slot)
{
    return slot->request->origin == OF_REPLAY && !slot->q->journal.is_replaying;
}

/*
 * Assign a slot to a handle if its command can be sent now.  If not, put it into q->blocked or,
 * with an error, into q->answered.  The caller has the turn.  Returns whether the command can be
 * sent.
 */
static bool assign_member(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    bool is_alive;

    /*
     * All of this is one step under the lock.  nbdqueue_cancel either marks the request before, and
     * the command is not sent, or it finds the slot in flight, and other commands wait for it.
     *
     * A command that becomes an orphan after this check does not matter: its caller is still
     * waiting now, so the two are concurrent, and nothing orders them.
     */
    pthread_mutex_lock(&q->lock);
    slot->member = choose_member(slot, side_of(slot), &is_alive);
    is_alive = q->endpoints[side_of(slot)].error == 0 && is_alive;
    if (slot->request->is_cancelled || q->is_dropped || is_outdated(slot) ||
        (!is_alive && !is_awaited(q, side_of(slot)))) {
        slot->error = is_alive ? ECANCELED : lost_error(q, side_of(slot));
        slot->member = NULL;
        list_answered(slot);
    } else if (slot->member == NULL || is_blocked(slot) || waits_for_replay(slot)) {
        slot->is_held |= waits_for_replay(slot);
        slot->member = NULL;
        slot->next = q->blocked;
        q->blocked = slot;
    } else {
        slot->is_in_flight = true;
        slot->token = slot->request->token;
        slot->flushes =
            slot->request->origin == OF_REPLAY ? q->journal.flush_serial : q->journal.serial;
        slot->member->in_flight++;
        q->in_flight++;
        atomic_fetch_add(&q->references, 1); /* libnbd's, until `retire` */
    }
    pthread_mutex_unlock(&q->lock);
    return slot->member != NULL;
}

/* Do a slot's command on a file, synchronously, and list the slot. */
static void use_file_now(struct slot *slot, struct queuefile *file)
{
    struct nbdqueue *q = slot->q;

    slot->member = NULL;
    slot->error = use_file(slot, file);
    nbdqueue_note_move(q);
    pthread_mutex_lock(&q->lock);
    list_answered(slot);
    pthread_mutex_unlock(&q->lock);
}

/*
 * Send a slot's command, unless its request was cancelled or the queue was dropped.  In every case
 * the slot ends up in q->answered; it is in q->blocked as long as the command has to wait.  The
 * caller has the turn.
 */
static void send_command(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    struct endpoint *endpoint = &q->endpoints[side_of(slot)];
    int64_t cookie;

    slot->is_in_flight = slot->is_issued = slot->is_answered = false;
    slot->error = 0;
    if (endpoint->file.fd >= 0) {
        use_file_now(slot, &endpoint->file);
        return;
    }
    if (!assign_member(slot))
        return;

    /*
     * Without q->lock, because libnbd may call `complete` and `retire` from inside.  From here on
     * another thread that moves the handle may do so too; but they only mark and list the slot.
     * Only the thread with the turn takes slots from the list, so the slot is still ours below.
     */
    cookie = call(slot);

    pthread_mutex_lock(&q->lock);
    slot->cookie = (uint64_t)cookie;
    slot->is_issued = true;
    if (cookie == -1) {
        slot->error = nbd_get_errno() != 0 ? nbd_get_errno() : EIO;
        list_answered(slot);
    }
    pthread_mutex_unlock(&q->lock);
}

static uint64_t round_down(uint64_t n, uint64_t multiple)
{
    return n - n % multiple;
}

static uint64_t round_up(uint64_t n, uint64_t multiple)
{
    return round_down(n + multiple - 1, multiple);
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static bool is_change(enum nbdqueue_operation operation)
{
    return operation == NBDQUEUE_WRITE || operation == NBDQUEUE_ZERO;
}

/* Whether the operation transfers data, so that the maximum block size applies. */
static bool has_payload(const struct nbdqueue *q, enum nbdqueue_operation operation)
{
    return operation == NBDQUEUE_READ || operation == NBDQUEUE_WRITE ||
           operation == NBDQUEUE_COPY ||
           (operation == NBDQUEUE_ZERO && !q->endpoints[NBDQUEUE_TARGET].has_zero);
}

/* Where the next piece of a request stops. */
static uint64_t stop_of_piece(const struct nbdqueue *q, const struct request *r)
{
    const struct endpoint *endpoint = &q->endpoints[NBDQUEUE_TARGET];
    uint64_t block = round_down(r->cut, endpoint->minimum);
    uint64_t largest = has_payload(q, r->operation) ? q->piece
                       : endpoint->is_bounded       ? endpoint->maximum
                                                    : MAX_RANGE;
    uint64_t last = smaller(r->stop, block + largest);

    if (r->operation == NBDQUEUE_COPY) /* later pieces are aligned, and so are their blocks */
        return smaller(r->stop, round_down(r->cut, q->piece) + q->piece);
    if (r->operation != NBDQUEUE_ZERO)
        return last;
    if (r->cut != block) /* an edge of a zero is a piece of its own */
        return smaller(last, block + endpoint->minimum);
    if (last == endpoint->size)
        return last;
    return last - block > endpoint->minimum ? round_down(last, endpoint->minimum) : last;
}

/* Fit the next piece of a request into a slot, without cutting it off yet. */
static void fit(struct slot *slot, struct request *r)
{
    const struct nbdqueue *q = slot->q;
    const struct endpoint *endpoint = &q->endpoints[NBDQUEUE_TARGET];
    bool is_range = r->operation != NBDQUEUE_FLUSH && r->operation != NBDQUEUE_COPY;
    uint64_t last = stop_of_piece(q, r), wide_stop = last;

    slot->request = r;
    slot->offset = slot->wide_offset = r->cut;
    slot->length = last - r->cut;
    if (is_range) {
        slot->wide_offset = round_down(r->cut, endpoint->minimum);
        wide_stop = smaller(round_up(last, endpoint->minimum), endpoint->size);
    }
    slot->wide_length = wide_stop - slot->wide_offset;
    slot->merges = is_change(r->operation) && slot->wide_length != slot->length;
}

/*
 * Whether a change of blocks has to wait.  A merge reads its blocks and writes them back later: a
 * change of the same blocks in between would be undone.  q->lock is locked.
 */
static bool has_to_wait(const struct slot *slot)
{
    const struct nbdqueue *q = slot->q;

    if (q->endpoints[NBDQUEUE_TARGET].minimum == 1 || !is_change(slot->request->operation))
        return false;
    for (unsigned i = 0; i < q->slot_count; i++) {
        const struct slot *other = &q->slots[i];

        if (other != slot && other->request != NULL && is_change(other->request->operation) &&
            (slot->merges || other->merges) && overlap(other, slot))
            return true;
    }
    return false;
}

/* Free a slot.  q->lock is locked. */
static void put_back(struct slot *slot)
{
    struct slot **list = slot->is_reserved ? &slot->q->reserved : &slot->q->free;

    slot->request = NULL;
    slot->next = *list;
    *list = slot;
}

/* Append a request to the list of those that are done.  q->lock is locked. */
static void finish_request(struct nbdqueue *q, struct request *r)
{
    r->next = NULL;
    *q->last_done = r;
    q->last_done = &r->next;
    q->done_length++;
}

/* Remove the first request from the list of those not fully cut.  q->lock is locked. */
static void unqueue(struct nbdqueue *q)
{
    q->queued = q->queued->next;
    if (q->queued == NULL)
        q->last_queued = &q->queued;
}

/* Whether a request has to wait for a flush of the journal.  q->lock is locked. */
static bool waits_for_flush(const struct nbdqueue *q, const struct request *r)
{
    return (is_changing(r->operation) || r->operation == NBDQUEUE_COPY) && journal_is_full(q);
}

/* Fail the request that waits for a flush of the journal which has failed.  q->lock is locked. */
static void fail_unflushed(struct nbdqueue *q)
{
    struct request *r = q->queued;

    if (q->journal.flush_error == 0 || r == NULL || !waits_for_flush(q, r))
        return;
    if (r->error == 0) {
        r->error = q->journal.flush_error;
        r->error_offset = r->cut;
        r->error_length = r->stop - r->cut;
        r->error_side = NBDQUEUE_TARGET;
        r->error_command = NBDQUEUE_FLUSH;
    }
    r->cut = r->stop;
    q->journal.flush_error = 0;
}

/*
 * Cut a piece off the first request.  Returns its slot, or NULL if there is no request or no free
 * slot, or if the piece has to wait.
 */
static struct slot *next_piece(struct nbdqueue *q)
{
    struct slot *slot;
    struct request *r;

    pthread_mutex_lock(&q->lock);
    fail_unflushed(q);
    while (q->queued != NULL &&
           q->queued->cut == q->queued->stop) { /* failed, cancelled or empty */
        r = q->queued;
        unqueue(q);
        if (r->in_flight == 0)
            finish_request(q, r);
    }
    r = q->queued;
    slot = q->free;
    if (r == NULL || slot == NULL || q->is_dropped || waits_for_flush(q, r)) {
        slot = NULL;
    } else {
        fit(slot, r);
        if (has_to_wait(slot)) {
            slot->request = NULL;
            slot = NULL;
        }
    }
    if (slot != NULL) {
        q->free = slot->next;
        r->in_flight++;
        r->cut += slot->length;
        if (r->cut == r->stop)
            unqueue(q);
    }
    pthread_mutex_unlock(&q->lock);
    return slot;
}

/* Allocate memory that also suits files opened with O_DIRECT; NULL if out of memory. */
static char *aligned_memory(size_t size)
{
    return aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

/* Choose a slot's memory: the caller's buffer, zeroes or a bounce buffer.  Returns 0 or ENOMEM. */
static int choose_memory(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    const struct request *r = slot->request;
    bool is_zeroes = r->operation == NBDQUEUE_ZERO && !slot->merges;
    bool in_place = r->buffer != NULL && slot->wide_length == slot->length;

    if (in_place) {
        slot->data = r->buffer + (slot->offset - r->start);
        return 0;
    }
    if (is_zeroes) {
        if (q->zeroes == NULL) {
            q->zeroes = aligned_memory(q->piece);
            if (q->zeroes != NULL)
                memset(q->zeroes, 0, q->piece);
        }
        slot->data = q->zeroes;
        return q->zeroes == NULL ? ENOMEM : 0;
    }
    if (slot->bounce == NULL)
        slot->bounce = aligned_memory(q->piece);
    slot->data = slot->bounce;
    return slot->bounce == NULL ? ENOMEM : 0;
}

/* Whether nothing is sent to the target for zeroes. */
static bool skips_zeroes(const struct nbdqueue *q)
{
    return q->target_is_zero || q->endpoints[NBDQUEUE_TARGET].is_null;
}

/* Send the first command of a new piece, if it needs any.  The caller has the turn. */
static void start(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    enum nbdqueue_operation operation = slot->request->operation;
    bool is_skipped = operation == NBDQUEUE_ZERO && skips_zeroes(q);

    slot->command = operation;
    slot->member = NULL;
    slot->error = 0;
    slot->zeroed = slot->written = 0;
    slot->is_held = false;
    if (is_skipped)
        slot->merges = false;
    else if (operation == NBDQUEUE_COPY || slot->merges)
        slot->command = NBDQUEUE_READ;
    else if (operation == NBDQUEUE_ZERO && !q->endpoints[NBDQUEUE_TARGET].has_zero)
        slot->command = NBDQUEUE_WRITE;
    if (!is_skipped &&
        (is_change(operation) || operation == NBDQUEUE_READ || operation == NBDQUEUE_COPY))
        slot->error = choose_memory(slot);
    if (!is_skipped && slot->error == 0) {
        send_command(slot);
        return;
    }
    pthread_mutex_lock(&q->lock);
    list_answered(slot);
    pthread_mutex_unlock(&q->lock);
}

/*
 * Find the run that starts at offset `at` in the piece of a copy that was read: blocks that all
 * have only zeroes in them, or that all have data.  Returns its end.
 */
static uint64_t end_of_run(const struct slot *slot, uint64_t at, bool *is_zero)
{
    const struct nbdqueue *q = slot->q;
    const struct endpoint *endpoint = &q->endpoints[NBDQUEUE_TARGET];
    size_t before = (size_t)(at - slot->offset);
    int64_t run = (int64_t)(slot->length - before);

    if (q->sparse != 0 && (endpoint->has_zero || q->target_is_zero))
        run = nbdshim_run(slot->bounce + before, (size_t)run, at,
                          q->sparse > endpoint->minimum ? q->sparse : endpoint->minimum);
    *is_zero = run < 0;
    return at + (uint64_t)(run < 0 ? -run : run);
}

/*
 * Prepare the next command to the target for the piece of a copy: the write or zero of a run.
 * Returns false after the last run.
 */
static bool next_run(struct slot *slot)
{
    const struct nbdqueue *q = slot->q;
    uint64_t stop = slot->offset + slot->length;
    uint64_t at =
        slot->command == NBDQUEUE_READ ? slot->offset : slot->wide_offset + slot->wide_length;

    if (q->endpoints[NBDQUEUE_TARGET].is_null)
        return false;
    for (bool is_zero; at < stop; at = slot->wide_offset + slot->wide_length) {
        slot->wide_offset = at;
        slot->wide_length = end_of_run(slot, at, &is_zero) - at;
        slot->data = slot->bounce + (at - slot->offset);
        slot->command = is_zero ? NBDQUEUE_ZERO : NBDQUEUE_WRITE;
        if (is_zero)
            slot->zeroed += slot->wide_length;
        if (!is_zero || !q->target_is_zero)
            return true;
    }
    return false;
}

/*
 * Begin the commands to the target for a piece anew, as the server may have lost what it did for
 * the first ones.  A piece that merges has one, which needs no change.
 */
static void rewind_piece(struct slot *slot)
{
    const struct endpoint *endpoint = &slot->q->endpoints[NBDQUEUE_TARGET];
    enum nbdqueue_operation operation = slot->request->operation;

    if (slot->merges || operation == NBDQUEUE_FLUSH)
        return;
    slot->zeroed = slot->written = 0;
    if (operation == NBDQUEUE_COPY) {
        slot->command = NBDQUEUE_READ;
        (void)next_run(slot); /* there is one, because it was sent before */
        return;
    }
    slot->wide_offset = round_down(slot->offset, endpoint->minimum);
    slot->wide_length =
        smaller(round_up(slot->offset + slot->length, endpoint->minimum), endpoint->size) -
        slot->wide_offset;
}

/* Try again to send the blocked commands, which may block again.  The caller has the turn. */
static void send_blocked(struct nbdqueue *q)
{
    struct slot *list = q->blocked, *next;

    q->blocked = NULL;
    for (; list != NULL; list = next) {
        next = list->next;
        if (list->is_held && !q->journal.is_due) {
            list->is_held = false;
            rewind_piece(list);
        }
        send_command(list);
    }
}

/* Begin to work on a request of the queue's own in a reserved slot.  q->lock is locked. */
static struct slot *reserve(struct nbdqueue *q, struct request *r)
{
    struct slot *slot = q->reserved;

    if (slot == NULL)
        return NULL;
    fit(slot, r);
    q->reserved = slot->next;
    r->in_flight++;
    return slot;
}

/* Flush the target if the journal is full, and changes wait for that.  The caller has the turn. */
static void flush_journal(struct nbdqueue *q)
{
    struct journal *j = &q->journal;
    struct slot *slot = NULL;

    pthread_mutex_lock(&q->lock);
    if (!j->is_flushing && !q->is_dropped && q->queued != NULL && waits_for_flush(q, q->queued))
        slot = reserve(q, &j->flush);
    if (slot != NULL)
        j->is_flushing = true;
    pthread_mutex_unlock(&q->lock);
    if (slot != NULL)
        start(slot);
}

/* Whether a command to the target may be in flight.  q->lock is locked. */
static bool is_target_busy(const struct nbdqueue *q)
{
    for (unsigned i = 0; i < q->slot_count; i++) {
        const struct slot *slot = &q->slots[i];

        if (slot->request != NULL && (slot->is_in_flight || slot->is_listed) &&
            side_of(slot) == NBDQUEUE_TARGET)
            return true;
    }
    return false;
}

/* Whether a side has a connection that is not lost, or that was not found to be. */
static bool has_connection(const struct nbdqueue *q, enum nbdqueue_side side)
{
    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].side == side && q->members[i].is_entered && !q->members[i].is_lost)
            return true;
    }
    return false;
}

/*
 * Whether a slot's piece overlaps a change that is being made again.  The command of that one may
 * have a part of the piece only, and a piece is merged into whole blocks.  q->lock is locked.
 */
static bool overlaps_replay(const struct slot *slot)
{
    const struct nbdqueue *q = slot->q;
    uint64_t block = q->endpoints[NBDQUEUE_TARGET].minimum;
    uint64_t from = round_down(slot->offset, block);
    uint64_t to = round_up(slot->offset + slot->length, block);

    for (unsigned i = q->depth; i < q->slot_count; i++) {
        const struct slot *other = &q->slots[i];

        if (other != slot && other->request != NULL && other->request->origin == OF_REPLAY &&
            round_down(other->offset, block) < to &&
            from < round_up(other->offset + other->length, block))
            return true;
    }
    return false;
}

/*
 * The slot for a flush of what was made again so far, or NULL if it has to wait for that.  q->lock
 * is locked.
 */
static struct slot *flush_part(struct nbdqueue *q)
{
    struct journal *j = &q->journal;
    struct slot *slot;

    if (j->in_flight > 0)
        return NULL;
    slot = reserve(q, &j->part_flush);
    if (slot == NULL)
        return NULL;
    j->flush_serial = j->cursor->serial - 1;
    j->replayed = 0;
    j->in_flight++;
    return slot;
}

/*
 * The slot for the next change that has to be made again, or NULL if it has to wait or there is
 * none.  After the last one, the journal is not due any more.  Changes that overlap are made one
 * after the other.  q->lock is locked.
 */
static struct slot *next_replay(struct nbdqueue *q)
{
    struct journal *j = &q->journal;
    struct request *r;
    struct slot *slot;

    if (!j->is_due || q->is_dropped || q->endpoints[NBDQUEUE_TARGET].error != 0)
        return NULL;
    if (!j->is_replaying) {
        if (j->in_flight > 0 || is_target_busy(q) || !has_connection(q, NBDQUEUE_TARGET))
            return NULL;
        for (struct change *c = j->first; c != NULL; c = c->next)
            c->request.cut = c->request.start;
        j->cursor = j->first;
        j->replayed = 0;
        j->is_replaying = true;
    }
    if (j->cursor == NULL) {
        if (j->in_flight > 0)
            return NULL;
        j->is_due = j->is_replaying = false;
        j->part = UINT64_MAX;
        return NULL;
    }
    if (j->replayed > j->part)
        return flush_part(q);
    r = &j->cursor->request;
    slot = reserve(q, r);
    if (slot == NULL)
        return NULL;
    if (overlaps_replay(slot)) {
        r->in_flight--;
        put_back(slot);
        return NULL;
    }
    j->in_flight++;
    r->cut += slot->length;
    if (r->cut == r->stop) {
        j->replayed += j->cursor->cost;
        j->cursor = j->cursor->next;
    }
    return slot;
}

/* Make the changes of the journal again, as far as that is possible now. */
static void replay(struct nbdqueue *q)
{
    struct slot *slot;

    do {
        pthread_mutex_lock(&q->lock);
        slot = next_replay(q);
        pthread_mutex_unlock(&q->lock);
        if (slot != NULL)
            start(slot);
    } while (slot != NULL);
}

void pieces_pump(struct nbdqueue *q)
{
    struct slot *slot;

    if (q->journal.is_due)
        replay(q);
    if (q->blocked != NULL)
        send_blocked(q);
    if (q->journal.size != 0)
        flush_journal(q);
    while ((slot = next_piece(q)) != NULL)
        start(slot);
}

/* Finish a change that was made again.  q->lock is locked. */
static void finish_replay(struct slot *slot)
{
    struct nbdqueue *q = slot->q;

    /* What was acknowledged is lost now: fail everything, rather than go on without it. */
    if (slot->error != 0 && !is_outdated(slot) && q->endpoints[NBDQUEUE_TARGET].error == 0)
        q->endpoints[NBDQUEUE_TARGET].error = slot->error;
    slot->request->in_flight--;
    q->journal.in_flight--;
    put_back(slot);
}

/* Finish a flush of the journal.  q->lock is locked. */
static void finish_journal_flush(struct slot *slot)
{
    struct journal *j = &slot->q->journal;

    j->flush.in_flight--;
    j->is_flushing = false;
    j->flush_error = slot->error;
    put_back(slot);
}

/* Finish a piece: free its slot, and finish its request if it was the last.  q->lock is locked. */
static void finish_piece(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    struct request *r = slot->request;

    if (slot->command == NBDQUEUE_FLUSH && slot->error == 0 && journal_is_on(q))
        journal_clear(q, slot->flushes);
    if (r->origin == OF_REPLAY) {
        finish_replay(slot);
        return;
    }
    if (r->origin == OF_JOURNAL) {
        finish_journal_flush(slot);
        return;
    }
    if (slot->error != 0 && r->error == 0) {
        bool is_copy = r->operation == NBDQUEUE_COPY; /* its command is exactly what has failed */

        r->error = slot->error;
        r->error_offset = is_copy ? slot->wide_offset : slot->offset;
        r->error_length = is_copy ? slot->wide_length : slot->length;
        r->error_side = side_of(slot);
        r->error_command = slot->command;
    }
    if (slot->error != 0) {
        r->cut = r->stop; /* send no more; next_piece finishes it if it is queued */
    } else if (r->operation == NBDQUEUE_COPY || r->operation == NBDQUEUE_ZERO) {
        uint64_t zeroed = r->operation == NBDQUEUE_ZERO ? slot->length : slot->zeroed;

        if (r->operation == NBDQUEUE_COPY)
            atomic_fetch_add(&q->read, slot->length);
        atomic_fetch_add(&q->copied, slot->length - zeroed);
        atomic_fetch_add(&q->zeroed, zeroed);
        atomic_fetch_add(&q->written, slot->written);
        r->moved += slot->length;
        r->zeroed += zeroed;
    }
    if (r->is_cancelled)
        q->cancelled--;
    put_back(slot);
    r->in_flight--;
    if (r->in_flight == 0 && r != q->queued)
        finish_request(q, r);
}

/*
 * Prepare the next command of a piece without data that takes more than one.  A server may refuse
 * such a command if it is larger than its maximum block size; then repeat it with that size, and
 * continue with the next part.  Returns whether another command follows.
 */
static bool cut_further(struct slot *slot)
{
    struct endpoint *endpoint = &slot->q->endpoints[NBDQUEUE_TARGET];
    uint64_t stop =
        smaller(round_up(slot->offset + slot->length, endpoint->minimum), endpoint->size);

    if (slot->request->operation == NBDQUEUE_COPY || /* a run is never larger than a piece */
        (slot->command != NBDQUEUE_ZERO && slot->command != NBDQUEUE_TRIM &&
         slot->command != NBDQUEUE_CACHE))
        return false;
    if (slot->error == EINVAL && endpoint->maximum != 0 && slot->wide_length > endpoint->maximum) {
        endpoint->is_bounded = true;
        slot->wide_length = endpoint->maximum;
        return true;
    }
    if (slot->error != 0 || slot->wide_offset + slot->wide_length >= stop)
        return false;
    slot->wide_offset += slot->wide_length;
    slot->wide_length = smaller(endpoint->maximum, stop - slot->wide_offset);
    return true;
}

/* Count the bytes that a slot's command has written as data for a copy or a zero. */
static void count_written(struct slot *slot)
{
    if (slot->command == NBDQUEUE_WRITE && slot->error == 0)
        slot->written += slot->wide_length;
}

/*
 * Continue the piece of a copy: send the command for its next run, or do all runs if the target is
 * a file.  Returns whether a command was sent; otherwise the piece has ended.
 */
static bool continue_copy(struct slot *slot)
{
    struct queuefile *file = &slot->q->endpoints[NBDQUEUE_TARGET].file;

    while (slot->error == 0 && next_run(slot)) {
        if (file->fd < 0) {
            send_command(slot);
            return true;
        }
        slot->error = use_file(slot, file);
        nbdqueue_note_move(slot->q);
        count_written(slot);
    }
    return false;
}

/*
 * Continue a slot whose command has ended: send the next command of its piece, or finish the piece.
 * The caller has the turn, and libnbd does not use the slot.
 */
static void advance(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    const struct request *r = slot->request;
    bool was_read = slot->command == NBDQUEUE_READ && slot->error == 0;
    size_t before = (size_t)(slot->offset - slot->wide_offset);
    struct change *change;

    if (cut_further(slot)) {
        send_command(slot);
        return;
    }
    if (was_read && slot->merges) {
        if (r->operation == NBDQUEUE_ZERO)
            memset(slot->bounce + before, 0, slot->length);
        else
            memcpy(slot->bounce + before, r->buffer + (slot->offset - r->start), slot->length);
    }
    count_written(slot);
    if (r->operation == NBDQUEUE_COPY && continue_copy(slot))
        return;
    if (was_read && slot->merges) {
        slot->command = NBDQUEUE_WRITE;
        send_command(slot);
        return;
    }
    if (was_read && slot->data == slot->bounce && r->operation == NBDQUEUE_READ)
        memcpy(r->buffer + (slot->offset - r->start), slot->bounce + before, slot->length);
    change = q->journal.bound != 0 ? journal_prepare(slot) : NULL;
    pthread_mutex_lock(&q->lock);
    if (change != NULL)
        journal_append(q, change);
    finish_piece(slot);
    pthread_mutex_unlock(&q->lock);
}

/* Note that a connection was lost which is to be replaced. */
static void note_loss(struct nbdqueue *q, const struct member *m)
{
    pthread_mutex_lock(&q->lock);
    q->losses++;
    q->is_woken = true;
    if (m->side == NBDQUEUE_TARGET)
        journal_interrupt(q, true);
    pthread_mutex_unlock(&q->lock);
}

void pieces_mark_lost(struct nbdqueue *q, struct member *m, int error)
{
    bool is_noted = m->is_lost;

    m->is_lost = true;
    watch_remove(q, m);
    if (m->error == 0)
        m->error = error != 0 ? error : ENOTCONN;
    if (m->is_entered)
        nbdshim_note_end(m->s);
    if (!is_noted && q->endpoints[m->side].can_reconnect)
        note_loss(q, m);
}

/* Retire a read, and get its error. */
static void retire_read(struct slot *slot)
{
    struct member *m = slot->member;

    if (nbd_aio_command_completed(m->s->h, slot->cookie) == -1 && slot->error == 0)
        slot->error = nbd_get_errno() != 0 ? nbd_get_errno() : EIO;
}

/*
 * Replace the error of a command by that of its connection, if the connection is dead.  libnbd then
 * refuses new commands with EINVAL, and fails those in flight with ENOTCONN.  Any other error of an
 * answered command is the server's, and stays.  Returns whether it was replaced.
 */
static bool explain(struct slot *slot)
{
    struct member *m = slot->member;
    bool is_answer = slot->is_answered && slot->error != ENOTCONN;

    if (!m->is_lost && m->is_entered &&
        (nbd_aio_is_dead(m->s->h) == 1 || nbd_aio_is_closed(m->s->h) == 1))
        pieces_mark_lost(slot->q, m, ENOTCONN);
    if (is_answer && slot->error == ESHUTDOWN && is_awaited(slot->q, m->side)) {
        /* The server is ending, and has done nothing: do not wait until it disconnects. */
        (void)shutdown(nbd_aio_get_fd(m->s->h), SHUT_RDWR);
        return true;
    }
    if (!m->is_lost || is_answer)
        return false;
    slot->error = m->error;
    return true;
}

/*
 * Count a command that its server has answered, for nbdqueue_answers.  A change that was made again
 * may have to be made once more, so only a flush of it counts.
 */
static void count_answer(const struct slot *slot)
{
    struct endpoint *endpoint = &slot->q->endpoints[side_of(slot)];
    bool is_progress = slot->request->origin != OF_REPLAY || slot->command == NBDQUEUE_FLUSH;

    if (endpoint->can_reconnect && slot->member != NULL && is_progress)
        endpoint->answers++;
}

/*
 * Continue with a slot whose command has ended.  A command whose connection was lost is sent again
 * if the connection is replaced.
 */
static void reap(struct slot *slot)
{
    bool is_lost = slot->error != 0 && slot->member != NULL && explain(slot);

    /* The command is retired, so no other thread lists this slot before it is sent again. */
    slot->is_listed = false;
    if (!is_lost)
        count_answer(slot);
    if (!is_lost || !is_awaited(slot->q, side_of(slot))) {
        advance(slot);
        return;
    }
    if (side_of(slot) == NBDQUEUE_TARGET && !is_outdated(slot))
        rewind_piece(slot);
    send_command(slot);
}

bool pieces_reap(struct nbdqueue *q)
{
    struct slot *list, *next;
    bool is_some;

    /*
     * Take the whole list.  From here on these slots are ours: list_answered leaves a slot alone
     * that is already listed, and is_listed stays set until we are done with it.
     */
    pthread_mutex_lock(&q->lock);
    list = q->answered;
    q->answered = NULL;
    pthread_mutex_unlock(&q->lock);
    is_some = list != NULL;
    for (; list != NULL; list = next) {
        bool is_in_flight;

        /*
         * A slot in flight is a read that was answered and not retired: `complete` has left that to
         * us.  Read `next` under the lock, before `advance` puts the slot into another list.
         */
        pthread_mutex_lock(&q->lock);
        next = list->next;
        is_in_flight = list->is_in_flight;
        if (is_in_flight && !list->member->is_entered)
            list->is_listed = false; /* closed: nbd_close in another thread retires and lists it */
        pthread_mutex_unlock(&q->lock);
        if (is_in_flight && !list->member->is_entered)
            continue;
        /*
         * This thread has entered the handle, so nbd_close cannot retire the read meanwhile. libnbd
         * calls `retire` inside, which takes q->lock; it does not list the slot again.
         */
        if (is_in_flight)
            retire_read(list);
        reap(list);
    }
    return is_some;
}

/* Retire the reads that were answered but not reaped: nobody needs their results any more. */
static void retire_answered(struct nbdqueue *q)
{
    for (unsigned i = 0; i < q->slot_count; i++) {
        struct slot *slot = &q->slots[i];
        bool is_left;

        pthread_mutex_lock(&q->lock);
        is_left = slot->is_in_flight && slot->is_answered && slot->member->is_entered;
        pthread_mutex_unlock(&q->lock);
        if (is_left)
            (void)nbd_aio_command_completed(slot->member->s->h, slot->cookie);
    }
}

/*
 * Drop the request of a slot, and make its command an orphan if libnbd still has it.  q->lock is
 * locked, so `retire` runs either before, and the slot is not in flight any more, or after, and
 * removes the orphan again.
 */
static void orphan(struct slot *slot)
{
    struct request *r = slot->request;

    slot->request = NULL;
    if (slot->is_in_flight && !slot->is_answered && !slot->is_orphan) {
        slot->is_orphan = true;
        slot->range = (struct nbdshim_range){
            .start = slot->wide_offset,
            .stop = slot->wide_offset + (is_changing(slot->command) ? slot->wide_length : 0)};
        nbdshim_add_orphan(slot->member->s, &slot->range, bytes_of(slot));
    }
    if (r != NULL && --r->in_flight == 0 && r->origin == OF_CALLER)
        free(r);
}

/* Free the requests of a list, except those that slots still refer to; `orphan` frees these. */
static void free_requests(struct request *list)
{
    for (struct request *next; list != NULL; list = next) {
        next = list->next;
        if (list->in_flight == 0)
            free(list);
    }
}

void pieces_cancel(struct nbdqueue *q, uintptr_t token)
{
    for (unsigned i = 0; i < q->slot_count; i++) {
        struct slot *slot = &q->slots[i];

        if (slot->request != NULL && slot->request->token == token &&
            slot->request->origin == OF_CALLER) {
            q->cancelled += !slot->request->is_cancelled ? slot->request->in_flight : 0;
            slot->request->is_cancelled = true;
        }
    }
}

void pieces_forget(struct nbdqueue *q, struct nbdshim *s)
{
    retire_answered(q);
    pthread_mutex_lock(&q->lock);
    free_requests(q->queued);
    free_requests(q->done);
    q->queued = q->done = NULL;
    q->length = q->done_length = 0;
    q->answered = q->blocked = NULL;
    q->is_forgotten = true;
    for (unsigned i = 0; i < q->slot_count; i++)
        orphan(&q->slots[i]);
    if (q->in_flight == 0)
        release_buffers(q, s);
    pthread_mutex_unlock(&q->lock);
}

int pieces_check(const struct nbdqueue *q, struct request *r)
{
    const struct endpoint *endpoint = &q->endpoints[NBDQUEUE_TARGET];
    const struct endpoint *source = &q->endpoints[NBDQUEUE_SOURCE];

    if (r->operation == NBDQUEUE_FLUSH) {
        r->start = r->cut = 0;
        r->stop = 1; /* one piece */
        return 0;
    }
    if (r->stop < r->start || r->stop > endpoint->size)
        return is_change(r->operation) || r->operation == NBDQUEUE_COPY ? ENOSPC : EINVAL;
    if (r->operation == NBDQUEUE_COPY &&
        (r->stop > source->size || r->start % endpoint->minimum != 0 ||
         r->start % source->minimum != 0 ||
         (r->stop != endpoint->size && r->stop % endpoint->minimum != 0) ||
         (r->stop != source->size && r->stop % source->minimum != 0)))
        return EINVAL;
    if (r->operation == NBDQUEUE_TRIM) { /* leave out the edges */
        r->cut = r->start + (endpoint->minimum - r->start % endpoint->minimum) % endpoint->minimum;
        if (r->stop != endpoint->size)
            r->stop = round_down(r->stop, endpoint->minimum);
        if (r->cut > r->stop)
            r->cut = r->stop;
    }
    return 0;
}

void pieces_choose_size(struct nbdqueue *q)
{
    uint32_t minimum = 1;

    for (size_t i = 0; i < 2; i++) {
        const struct endpoint *endpoint = &q->endpoints[i];

        if (endpoint->minimum > minimum)
            minimum = endpoint->minimum;
        if (endpoint->maximum != 0 && endpoint->maximum < q->piece)
            q->piece = endpoint->maximum;
    }
    q->piece = q->piece < minimum ? minimum : (uint32_t)round_down(q->piece, minimum);
}
