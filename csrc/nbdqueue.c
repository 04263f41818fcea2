// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * A queue of requests; see nbdqueue.h.
 *
 * The way of a piece.  `pump` cuts it off the first request and gives it to a slot.  `send` makes
 * one command of it.  libnbd calls `complete` when the server has answered, and `retire` when it
 * has no more use for the slot; this happens in the thread that moves the connection, which may be
 * one that makes another call.  `reap` takes the answered slots in the thread that waits on the
 * queue, and `land` decides: the next command of the same piece, or its end.
 *
 * Locks.  Who has q->turn moves the queue: it sends, polls and reaps.  q->lock protects the lists
 * and counters, also from callbacks, which run while libnbd's lock is held.  So libnbd is never
 * called while q->lock is locked.
 */

#include "nbdqueue.h"
#include "wait.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Commands without data are not larger than this. */
#define LARGEST (UINT64_C(128) << 20)
/* Where another thread moves one of the handles, it is asked for again after so long. */
#define SHARED_SLICE (10 * NBDSHIM_MILLISECOND)
/* A queue that never sleeps runs the handlers of signals so often. */
#define BUSY_SLICE (20 * NBDSHIM_MILLISECOND)

/* A handle of the queue. */
struct member {
    struct nbdshim *s;
    enum nbdqueue_end end;
    unsigned flying; /* commands that libnbd has */
    int error;       /* of the connection, if it is lost */
    bool is_lost;    /* it is closed, or its connection has ended */
    bool is_entered; /* by the thread that has the queue's turn, as has_turn */
    bool has_turn;
};

struct end {
    size_t count; /* of its handles */
    int fd;       /* a file; -1 if the end has handles */
    uint64_t base, size;
    uint32_t minimum, maximum; /* of the server's block size constraints; maximum 0 is none */
    bool has_zero;             /* it has a command for zeroes */
};

struct request {
    struct request *next;
    enum nbdqueue_operation operation;
    uintptr_t token;
    char *buffer;
    uint64_t start, cut, end; /* the range; what is before cut was given to slots */
    uint32_t flags;
    unsigned flying; /* its slots */
    int error;
    uint64_t error_offset;
    enum nbdqueue_end error_end;
};

/* A piece of a request. */
struct slot {
    struct slot *next; /* free, or answered */
    struct nbdqueue *q;
    struct request *request;
    uint64_t offset, length;           /* the piece */
    uint64_t wide_offset, wide_length; /* what a command reads or writes for it */
    char *own;                         /* memory for wide ranges and copies; may be NULL */
    char *data;                        /* what the command reads into, or writes from */
    enum nbdqueue_operation command;   /* what is in flight */
    bool merges;                       /* it is read first, then merged and written */
    struct member *member;             /* NULL if it did not get to a handle */
    uint64_t cookie;
    int error;
    bool is_flying;   /* libnbd has it */
    bool is_issued;   /* the call that gives it to libnbd has returned */
    bool is_answered; /* the completion was called */
    bool is_listed;   /* in q->answered */
    bool is_orphan;
};

struct nbdqueue {
    sem_t turn;
    pthread_mutex_t lock;
    atomic_uint references; /* the caller's, and one for each command in flight */
    int waker;              /* an eventfd, which ends the poll of the thread that waits */
    bool is_sleeping;       /* the thread that waits is in poll */
    bool has_news;          /* requests were added while another thread had the turn */
    bool is_woken, is_dropped;
    bool is_forgotten; /* dropped, and no request is left */
    unsigned depth, flying;
    unsigned forks; /* nbdshim_forks of the process that made the queue */
    uint32_t piece;
    struct end ends[2];
    struct member members[NBDQUEUE_MOST_HANDLES];
    size_t count;
    struct slot *slots, *free, *answered;
    struct request *queued, **last_queued;
    struct request *done, **last_done;
    unsigned length, done_length;
    struct nbdshim_closure *keeper; /* its token stands for the buffers */
    char *zeroes;                   /* a piece of them */
    atomic_uint_fast64_t copied, zeroed;
    int64_t next_pause; /* when the handlers of signals are to run, at the latest */
};

struct nbdqueue *nbdqueue_create(unsigned depth, uint32_t piece, uintptr_t token)
{
    struct nbdqueue *q = calloc(1, sizeof *q);

    if (q == NULL)
        return NULL;
    q->waker = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    q->slots = calloc(depth, sizeof *q->slots);
    q->keeper = calloc(1, sizeof *q->keeper);
    if (q->waker < 0 || q->slots == NULL || q->keeper == NULL ||
        pthread_mutex_init(&q->lock, NULL) != 0) {
        if (q->waker >= 0)
            close(q->waker);
        free(q->slots);
        free(q->keeper);
        free(q);
        return NULL;
    }
    (void)sem_init(&q->turn, 0, 1);
    atomic_init(&q->references, 1);
    q->depth = depth;
    q->piece = piece;
    q->forks = atomic_load(&nbdshim_forks);
    q->keeper->token = token;
    q->last_queued = &q->queued;
    q->last_done = &q->done;
    for (size_t i = 0; i < 2; i++)
        q->ends[i] = (struct end){.fd = -1, .minimum = 1};
    for (unsigned i = 0; i < depth; i++) {
        q->slots[i].q = q;
        q->slots[i].next = q->free;
        q->free = &q->slots[i];
    }
    return q;
}

/* Let go of a queue; the last one frees it. */
static void unrefer(struct nbdqueue *q)
{
    if (atomic_fetch_sub(&q->references, 1) != 1)
        return;
    for (unsigned i = 0; i < q->depth; i++)
        free(q->slots[i].own);
    for (size_t i = 0; i < q->count; i++)
        nbdshim_disown(q->members[i].s);
    close(q->waker);
    pthread_mutex_destroy(&q->lock);
    sem_destroy(&q->turn);
    free(q->zeroes);
    free(q->keeper);
    free(q->slots);
    free(q);
}

/* One of the server's block size constraints; 0 if there is none. */
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

/* Ask a handle that was entered for what the queue has to know.  Returns 0, or -1 if it fails. */
static int note_export(struct end *end, struct nbdshim *s)
{
    int64_t size = nbd_get_size(s->h);
    uint32_t minimum = constraint(s, LIBNBD_SIZE_MINIMUM);
    uint32_t maximum = constraint(s, LIBNBD_SIZE_MAXIMUM);
    bool has_zero = nbd_can_zero(s->h) == 1;

    if (size == -1)
        return -1;
    if (end->count == 0 || (uint64_t)size < end->size)
        end->size = (uint64_t)size;
    if (minimum > end->minimum && (minimum & (minimum - 1)) == 0)
        end->minimum = minimum;
    if (maximum != 0 && (end->maximum == 0 || maximum < end->maximum))
        end->maximum = maximum;
    end->has_zero = has_zero && (end->count == 0 || end->has_zero);
    return 0;
}

int nbdqueue_add(struct nbdqueue *q, enum nbdqueue_end which, struct nbdshim *s)
{
    struct end *end = &q->ends[which];
    int ret = nbdshim_enter(s);

    if (ret != 0)
        return ret;
    if (q->count == NBDQUEUE_MOST_HANDLES) {
        nbdshim_leave(s);
        return NBDSHIM_NO_MEMORY;
    }
    ret = note_export(end, s);
    if (ret == 0) {
        atomic_fetch_add(&s->owners, 1);
        end->count++;
        q->members[q->count++] = (struct member){.s = s, .end = which};
    }
    nbdshim_leave(s);
    return ret;
}

void nbdqueue_add_file(struct nbdqueue *q, enum nbdqueue_end which, int fd, uint64_t base,
                       uint64_t size)
{
    q->ends[which] =
        (struct end){.fd = fd, .base = base, .size = size, .minimum = 1, .has_zero = true};
}

uint64_t nbdqueue_size(const struct nbdqueue *q, enum nbdqueue_end end)
{
    return q->ends[end].size;
}

uint32_t nbdqueue_minimum(const struct nbdqueue *q, enum nbdqueue_end end)
{
    return q->ends[end].minimum;
}

/* Have the thread that sleeps in poll look again.  q->lock is locked. */
static void wake(struct nbdqueue *q)
{
    const uint64_t one = 1;

    if (q->is_sleeping)
        (void)!write(q->waker, &one, sizeof one);
    q->is_sleeping = false;
}

/* Give a slot whose command has ended to `reap`.  q->lock is locked. */
static void list_answered(struct slot *slot)
{
    struct nbdqueue *q = slot->q;

    if (slot->is_listed || q->is_forgotten)
        return;
    slot->is_listed = true;
    slot->next = q->answered;
    q->answered = slot;
    wake(q);
}

/*
 * libnbd's completion callback.  Reads are retired by nbd_aio_command_completed, which alone tells
 * of a reply that has ended too early.
 */
// cppcheck-suppress constParameter ; libnbd has declared it
static int complete(void *user_data, int *error)
{
    struct slot *slot = user_data;
    struct nbdqueue *q = slot->q;
    int is_retired;

    pthread_mutex_lock(&q->lock);
    slot->is_answered = true;
    slot->error = *error;
    is_retired = q->is_dropped || slot->command != NBDQUEUE_READ;
    if (!is_retired)
        list_answered(slot);
    pthread_mutex_unlock(&q->lock);
    return is_retired;
}

/*
 * All was forgotten, and no command is in flight: nobody uses the buffers any more.  A queue that
 * was only dropped may have a piece that is not sent yet, or is not copied yet to its buffer.
 */
static void release_buffers(struct nbdqueue *q, struct nbdshim *s)
{
    struct nbdshim_closure *keeper = q->keeper;

    q->keeper = NULL;
    if (keeper == NULL || nbdshim_is_silent()) {
        free(keeper);
        return;
    }
    keeper->s = s;
    nbdshim_push_released(keeper);
}

/* How many bytes of memory a command in flight needs. */
static size_t bytes_of(const struct slot *slot)
{
    bool has_data = slot->command == NBDQUEUE_READ || slot->command == NBDQUEUE_WRITE;

    return has_data ? slot->wide_length : 0;
}

/* libnbd's `free` callback: it has no more use for the command. */
static void retire(void *user_data)
{
    struct slot *slot = user_data;
    struct nbdqueue *q = slot->q;
    struct nbdshim *s = slot->member->s;

    pthread_mutex_lock(&q->lock);
    slot->is_flying = false;
    slot->member->flying--;
    q->flying--;
    if (slot->is_orphan) {
        atomic_fetch_sub(&s->orphans, 1);
        atomic_fetch_sub(&s->orphan_bytes, bytes_of(slot));
    }
    if (!slot->is_answered && slot->is_issued)
        slot->error = ENOTCONN; /* the handle was closed */
    if (slot->is_issued || slot->is_answered)
        list_answered(slot);
    if (q->is_forgotten && q->flying == 0)
        release_buffers(q, s);
    pthread_mutex_unlock(&q->lock);
    unrefer(q);
}

/* Read or write a range of a file.  Returns 0 or an errno. */
static int move_bytes(int fd, bool writes, char *data, uint64_t length, uint64_t at)
{
    while (length > 0) {
        ssize_t n =
            writes ? pwrite(fd, data, length, (off_t)at) : pread(fd, data, length, (off_t)at);

        if (n == 0)
            return EIO; /* the file is shorter than it was */
        if (n < 0 && errno != EINTR)
            return errno;
        if (n > 0) {
            data += n;
            length -= (uint64_t)n;
            at += (uint64_t)n;
        }
    }
    return 0;
}

/* Make zeroes of a range of a file or block device.  Returns 0 or an errno. */
static int zero_bytes(const struct nbdqueue *q, int fd, uint64_t length, uint64_t at)
{
    uint64_t range[2] = {at, length};

    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length) == 0 ||
        fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length) == 0 ||
        ioctl(fd, BLKZEROOUT, range) == 0)
        return 0;
    while (length > 0) {
        uint64_t n = length < q->piece ? length : q->piece;
        int error = move_bytes(fd, true, q->zeroes, n, at);

        if (error != 0)
            return error;
        length -= n;
        at += n;
    }
    return 0;
}

static int use_file(const struct slot *slot, const struct end *end)
{
    uint64_t at = end->base + slot->wide_offset;

    switch (slot->command) {
    case NBDQUEUE_READ:
        return move_bytes(end->fd, false, slot->data, slot->wide_length, at);
    case NBDQUEUE_WRITE:
        return move_bytes(end->fd, true, slot->data, slot->wide_length, at);
    case NBDQUEUE_ZERO:
        return zero_bytes(slot->q, end->fd, slot->wide_length, at);
    case NBDQUEUE_FLUSH:
        return fdatasync(end->fd) == 0 ? 0 : errno;
    default:
        return ENOTSUP;
    }
}

/* The handle of an end that has the fewest commands in flight; NULL if all are lost. */
static struct member *least_busy(struct nbdqueue *q, enum nbdqueue_end end)
{
    struct member *found = NULL;

    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (m->end == end && m->is_entered && !m->is_lost &&
            (found == NULL || m->flying < found->flying))
            found = m;
    }
    return found;
}

/* The errno for a command for which there is no connection left. */
static int lost_error(const struct nbdqueue *q, enum nbdqueue_end end)
{
    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].end == end && q->members[i].error != 0)
            return q->members[i].error;
    }
    return ENOTCONN;
}

/* Make the call of libnbd for a slot.  Returns its cookie, or -1. */
static int64_t call(struct slot *slot)
{
    struct nbd_handle *h = slot->member->s->h;
    uint64_t at = slot->wide_offset, length = slot->wide_length;
    uint32_t flags = slot->request->flags;
    nbd_completion_callback done = {.callback = complete, .user_data = slot, .free = retire};

    if (slot->command == NBDQUEUE_READ)
        return nbd_aio_pread(h, slot->data, length, at, done, 0);
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

static enum nbdqueue_end end_of(const struct slot *slot)
{
    bool is_first_of_copy =
        slot->request->operation == NBDQUEUE_COPY && slot->command == NBDQUEUE_READ;

    return is_first_of_copy ? NBDQUEUE_SOURCE : NBDQUEUE_TARGET;
}

/* Send a slot's command.  Whatever becomes of it, the slot gets into q->answered. */
static void send_command(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    enum nbdqueue_end which = end_of(slot);
    const struct end *end = &q->ends[which];
    int64_t cookie;

    slot->is_flying = slot->is_issued = slot->is_answered = false;
    slot->member = NULL;
    slot->error = end->fd >= 0 ? use_file(slot, end) : 0;
    pthread_mutex_lock(&q->lock);
    if (end->fd < 0)
        slot->member = least_busy(q, which);
    if (slot->member == NULL) {
        if (end->fd < 0)
            slot->error = lost_error(q, which);
        list_answered(slot);
        pthread_mutex_unlock(&q->lock);
        return;
    }
    slot->is_flying = true;
    slot->member->flying++;
    q->flying++;
    atomic_fetch_add(&q->references, 1);
    pthread_mutex_unlock(&q->lock);

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

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static bool is_change(enum nbdqueue_operation operation)
{
    return operation == NBDQUEUE_WRITE || operation == NBDQUEUE_ZERO;
}

/* Whether the operation moves data, which the server may bound. */
static bool has_payload(const struct nbdqueue *q, enum nbdqueue_operation operation)
{
    return operation == NBDQUEUE_READ || operation == NBDQUEUE_WRITE ||
           operation == NBDQUEUE_COPY ||
           (operation == NBDQUEUE_ZERO && !q->ends[NBDQUEUE_TARGET].has_zero);
}

/* Where the next piece of a request ends. */
static uint64_t end_of_piece(const struct nbdqueue *q, const struct request *r)
{
    const struct end *end = &q->ends[NBDQUEUE_TARGET];
    uint64_t block = round_down(r->cut, end->minimum);
    uint64_t last = smaller(r->end, block + (has_payload(q, r->operation) ? q->piece : LARGEST));

    if (r->operation != NBDQUEUE_ZERO)
        return last;
    if (r->cut != block) /* the edges of a zero are pieces of their own */
        return smaller(last, block + end->minimum);
    if (last == end->size)
        return last;
    return last - block > end->minimum ? round_down(last, end->minimum) : last;
}

/* Give the next piece of a request to a slot, but do not cut it off yet. */
static void fit(struct slot *slot, struct request *r)
{
    const struct nbdqueue *q = slot->q;
    const struct end *end = &q->ends[NBDQUEUE_TARGET];
    bool is_range = r->operation != NBDQUEUE_FLUSH && r->operation != NBDQUEUE_COPY;
    uint64_t last = end_of_piece(q, r), wide_end = last;

    slot->request = r;
    slot->offset = slot->wide_offset = r->cut;
    slot->length = last - r->cut;
    if (is_range) {
        slot->wide_offset = round_down(r->cut, end->minimum);
        wide_end = smaller(round_down(last + end->minimum - 1, end->minimum), end->size);
    }
    slot->wide_length = wide_end - slot->wide_offset;
    slot->merges = is_change(r->operation) && slot->wide_length != slot->length;
}

/* Whether a change of blocks has to wait: a merge must be alone there.  q->lock is locked. */
static bool has_to_wait(const struct slot *slot)
{
    const struct nbdqueue *q = slot->q;

    if (q->ends[NBDQUEUE_TARGET].minimum == 1 || !is_change(slot->request->operation))
        return false;
    for (unsigned i = 0; i < q->depth; i++) {
        const struct slot *other = &q->slots[i];

        if (other != slot && other->request != NULL && is_change(other->request->operation) &&
            (slot->merges || other->merges) &&
            other->wide_offset < slot->wide_offset + slot->wide_length &&
            slot->wide_offset < other->wide_offset + other->wide_length)
            return true;
    }
    return false;
}

/* Put a request into the list of those that are done.  q->lock is locked. */
static void end_request(struct nbdqueue *q, struct request *r)
{
    r->next = NULL;
    *q->last_done = r;
    q->last_done = &r->next;
    q->done_length++;
}

/* Take the first request off the list of those that are not cut up.  q->lock is locked. */
static void unqueue(struct nbdqueue *q)
{
    q->queued = q->queued->next;
    if (q->queued == NULL)
        q->last_queued = &q->queued;
}

/*
 * Cut a piece off the first request.  Returns its slot; NULL if there is none, or if it has to
 * wait.
 */
static struct slot *next_piece(struct nbdqueue *q)
{
    struct slot *slot;
    struct request *r;

    pthread_mutex_lock(&q->lock);
    while (q->queued != NULL && q->queued->cut == q->queued->end) { /* it has failed, or is empty */
        r = q->queued;
        unqueue(q);
        if (r->flying == 0)
            end_request(q, r);
    }
    r = q->queued;
    slot = q->free;
    if (r == NULL || slot == NULL || q->is_dropped) {
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
        r->flying++;
        r->cut += slot->length;
        if (r->cut == r->end)
            unqueue(q);
    }
    pthread_mutex_unlock(&q->lock);
    return slot;
}

/* Memory for a piece that is not read or written in place, or zeroes.  Returns 0 or ENOMEM. */
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
        if (q->zeroes == NULL)
            q->zeroes = calloc(1, q->piece);
        slot->data = q->zeroes;
        return q->zeroes == NULL ? ENOMEM : 0;
    }
    if (slot->own == NULL)
        slot->own = malloc(q->piece);
    slot->data = slot->own;
    return slot->own == NULL ? ENOMEM : 0;
}

static void start(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    enum nbdqueue_operation operation = slot->request->operation;

    slot->command = operation;
    slot->member = NULL;
    if (operation == NBDQUEUE_COPY || slot->merges)
        slot->command = NBDQUEUE_READ;
    else if (operation == NBDQUEUE_ZERO && !q->ends[NBDQUEUE_TARGET].has_zero)
        slot->command = NBDQUEUE_WRITE;
    slot->error = 0;
    if (is_change(operation) || operation == NBDQUEUE_READ || operation == NBDQUEUE_COPY)
        slot->error = choose_memory(slot);
    if (slot->error == 0) {
        send_command(slot);
        return;
    }
    pthread_mutex_lock(&q->lock);
    list_answered(slot);
    pthread_mutex_unlock(&q->lock);
}

/* Send as much as the depth allows. */
static void pump(struct nbdqueue *q)
{
    struct slot *slot;

    while ((slot = next_piece(q)) != NULL)
        start(slot);
}

/* The end of a piece: its slot is free, and its request may be done.  q->lock is locked. */
static void end_piece(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    struct request *r = slot->request;

    if (slot->error != 0 && r->error == 0) {
        r->error = slot->error;
        r->error_offset = slot->offset;
        r->error_end = end_of(slot);
    }
    if (slot->error != 0)
        r->cut = r->end; /* if it is still queued, next_piece finds it */
    else if (r->operation == NBDQUEUE_COPY)
        atomic_fetch_add(&q->copied, slot->length);
    else if (r->operation == NBDQUEUE_ZERO)
        atomic_fetch_add(&q->zeroed, slot->length);
    slot->request = NULL;
    slot->next = q->free;
    q->free = slot;
    r->flying--;
    if (r->flying == 0 && r != q->queued)
        end_request(q, r);
}

/* What follows when a command of a slot has ended: the next one, or the end of the piece. */
static void land(struct slot *slot)
{
    struct nbdqueue *q = slot->q;
    const struct request *r = slot->request;
    bool was_read = slot->command == NBDQUEUE_READ && slot->error == 0;
    size_t before = (size_t)(slot->offset - slot->wide_offset);

    if (was_read && slot->merges) {
        if (r->operation == NBDQUEUE_ZERO)
            memset(slot->own + before, 0, slot->length);
        else
            memcpy(slot->own + before, r->buffer + (slot->offset - r->start), slot->length);
    }
    if (was_read && (slot->merges || r->operation == NBDQUEUE_COPY)) {
        slot->command = NBDQUEUE_WRITE;
        send_command(slot);
        return;
    }
    if (was_read && slot->data == slot->own)
        memcpy(r->buffer + (slot->offset - r->start), slot->own + before, slot->length);
    pthread_mutex_lock(&q->lock);
    end_piece(slot);
    pthread_mutex_unlock(&q->lock);
}

/* The connection of a handle has ended: no more commands go there. */
static void lose(struct member *m, int error)
{
    m->is_lost = true;
    if (m->error == 0)
        m->error = error != 0 ? error : ENOTCONN;
    if (m->is_entered)
        nbdshim_note_end(m->s);
}

/* Retire the command of a read, and find out its error. */
static void retire_read(struct slot *slot)
{
    struct member *m = slot->member;

    if (nbd_aio_command_completed(m->s->h, slot->cookie) == -1 && slot->error == 0)
        slot->error = nbd_get_errno() != 0 ? nbd_get_errno() : EIO;
}

/*
 * Commands that a dead connection has not sent fail with EINVAL, and those that it has sent with
 * ENOTCONN: tell the connection's error.  Any other error is the server's answer.
 */
static void explain(struct slot *slot)
{
    struct member *m = slot->member;
    bool is_answer = slot->is_answered && slot->error != ENOTCONN;

    if (!m->is_lost && m->is_entered &&
        (nbd_aio_is_dead(m->s->h) == 1 || nbd_aio_is_closed(m->s->h) == 1))
        lose(m, ENOTCONN);
    if (m->is_lost && !is_answer)
        slot->error = m->error;
}

/* Go on with the slots whose commands have ended.  Returns whether there were any. */
static bool reap(struct nbdqueue *q)
{
    struct slot *list, *next;
    bool is_some;

    pthread_mutex_lock(&q->lock);
    list = q->answered;
    q->answered = NULL;
    pthread_mutex_unlock(&q->lock);
    is_some = list != NULL;
    for (; list != NULL; list = next) {
        bool is_flying;

        pthread_mutex_lock(&q->lock);
        next = list->next;
        is_flying = list->is_flying;
        if (is_flying && !list->member->is_entered)
            list->is_listed = false; /* nbd_close, in another thread, will retire and list it */
        pthread_mutex_unlock(&q->lock);
        if (is_flying && !list->member->is_entered)
            continue;
        if (is_flying)
            retire_read(list);
        if (list->error != 0 && list->member != NULL)
            explain(list);
        list->is_listed = false;
        land(list);
    }
    return is_some;
}

/* Enter all handles.  Those that are closed are lost.  Returns 0 or NBDSHIM_REENTERED. */
static int enter_all(struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];
        int ret = nbdshim_enter(m->s);

        m->is_entered = ret == 0;
        if (ret == NBDSHIM_CLOSED)
            lose(m, ENOTCONN);
        if (ret != NBDSHIM_REENTERED)
            continue;
        while (i-- > 0) {
            if (q->members[i].is_entered)
                nbdshim_leave(q->members[i].s);
            q->members[i].is_entered = false;
        }
        return ret;
    }
    return 0;
}

/*
 * Give the turn back and leave the handles.  In this order: leaving hands tokens over, and that may
 * run functions which use the queue, and which would wait for the turn.
 */
static void end_turn(struct nbdqueue *q)
{
    struct nbdshim *entered[NBDQUEUE_MOST_HANDLES];
    size_t count = 0;

    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].is_entered)
            entered[count++] = q->members[i].s;
        q->members[i].is_entered = false;
    }
    sem_post(&q->turn);
    while (count > 0)
        nbdshim_leave(entered[--count]);
}

/* Whether this thread is in a callback of one of the handles, where libnbd's lock is held. */
static bool is_reentry(const struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        if (nbdshim_is_reentry(q->members[i].s))
            return true;
    }
    return false;
}

/* Let the handlers of signals run.  Returns 0 or NBDSHIM_STOPPED. */
static int run_handlers(struct nbdqueue *q)
{
    bool has_forked;
    int ret = nbdshim_run_handlers(&has_forked);

    for (size_t i = 0; has_forked && i < q->count; i++)
        nbdshim_cut(q->members[i].s);
    return ret;
}

/* Wait for the queue's turn.  Returns 0, NBDSHIM_STOPPED or NBDSHIM_TIMED_OUT. */
static int take_turn(struct nbdqueue *q, int64_t until)
{
    while (sem_trywait(&q->turn) != 0) {
        int ret;

        if (nbdshim_wait_for(&q->turn, until))
            break;
        if (nbdshim_slice(until) == 0)
            return NBDSHIM_TIMED_OUT;
        ret = run_handlers(q);
        if (ret != 0)
            return ret;
    }
    q->next_pause = nbdshim_deadline((double)BUSY_SLICE / (double)NBDSHIM_SECOND);
    return 0;
}

/*
 * Run the handlers of signals.  They may use the queue and the handles, so the turn is given back.
 * Returns 0 or NBDSHIM_STOPPED: then the turn is not taken again.
 */
static int pause_for_handlers(struct nbdqueue *q)
{
    int ret;

    end_turn(q);
    ret = run_handlers(q);
    if (ret != 0)
        return ret;
    ret = take_turn(q, NBDSHIM_NEVER);
    if (ret == 0)
        (void)enter_all(q); /* this thread is in no callback, so it is not refused */
    return ret;
}

/* Take the turns of the handles that have commands in flight.  Returns whether one is missing. */
static bool take_turns(struct nbdqueue *q)
{
    bool is_missing = false;

    pthread_mutex_lock(&q->lock);
    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (!m->is_entered || m->is_lost || m->flying == 0)
            continue;
        m->has_turn = atomic_load(&m->s->waiting) == 0 && sem_trywait(&m->s->turn) == 0;
        is_missing |= !m->has_turn;
    }
    pthread_mutex_unlock(&q->lock);
    return is_missing;
}

static void give_turns(struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        if (q->members[i].has_turn)
            sem_post(&q->members[i].s->turn);
        q->members[i].has_turn = false;
    }
}

/* What to poll a handle for. */
static struct pollfd poll_of(struct member *m)
{
    struct pollfd fd = {.fd = -1};
    unsigned direction = m->has_turn ? nbd_aio_get_direction(m->s->h) : 0;

    if (m->has_turn && direction == 0)
        lose(m, ENOTCONN);
    if (direction != 0)
        fd.fd = nbdshim_socket_of(m->s);
    if (direction & LIBNBD_AIO_DIRECTION_READ)
        fd.events |= POLLIN;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        fd.events |= POLLOUT;
    return fd;
}

/* Sleep in poll, until `until` at the most.  Returns what poll does. */
static int sleep_in_poll(struct nbdqueue *q, struct pollfd *fds, nfds_t count, int64_t longest)
{
    int ready;

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

/* Tell libnbd what poll has said of the handles. */
static void notify_all(struct nbdqueue *q, const struct pollfd *fds)
{
    uint64_t count;

    for (size_t i = 0; i < q->count; i++) {
        struct member *m = &q->members[i];

        if (m->has_turn && fds[i].revents != 0 && nbdshim_notify(m->s, fds[i].revents) == -1 &&
            (nbd_aio_is_dead(m->s->h) == 1 || nbd_aio_is_closed(m->s->h) == 1))
            lose(m, nbd_get_errno());
    }
    if (fds[q->count].revents != 0)
        (void)!read(q->waker, &count, sizeof count);
}

/*
 * Wait for the sockets and let libnbd go on.  Returns 1; 0 if nothing has happened; or as
 * pause_for_handlers.
 */
static int move(struct nbdqueue *q, int64_t until)
{
    struct pollfd fds[NBDQUEUE_MOST_HANDLES + 1];
    bool is_shared = take_turns(q);
    int64_t longest = nbdshim_slice(until);
    int ready, ret;

    for (size_t i = 0; i < q->count; i++)
        fds[i] = poll_of(&q->members[i]);
    fds[q->count] = (struct pollfd){.fd = q->waker, .events = POLLIN};
    if (is_shared && longest > SHARED_SLICE)
        longest = SHARED_SLICE;
    ready = sleep_in_poll(q, fds, q->count + 1, longest);
    if (ready > 0)
        notify_all(q, fds);
    give_turns(q);
    ret = reap(q) || ready > 0;
    if (ready < 0 || nbdshim_slice(q->next_pause) == 0) {
        int stopped = pause_for_handlers(q);

        return stopped != 0 ? stopped : ret;
    }
    return ret;
}

/* Whether a wait is over, for another reason than its time. */
static bool is_over(struct nbdqueue *q, unsigned least)
{
    bool is_over;

    pthread_mutex_lock(&q->lock);
    is_over =
        q->done_length >= least || q->done_length == q->length || q->is_woken || q->is_dropped;
    pthread_mutex_unlock(&q->lock);
    return is_over;
}

/* Write those that are done to `done`, at most `room` of them, and return how many. */
static int tell(struct nbdqueue *q, struct nbdqueue_done *done, int room)
{
    const struct request *r;
    int count = 0;

    pthread_mutex_lock(&q->lock);
    for (r = q->done; r != NULL && count < room; r = r->next) {
        done[count++] = (struct nbdqueue_done){.token = r->token,
                                               .offset = r->error_offset,
                                               .error = r->error,
                                               .end = (int)r->error_end};
    }
    q->is_woken = false;
    if (q->is_dropped)
        count = NBDSHIM_CLOSED;
    pthread_mutex_unlock(&q->lock);
    return count;
}

/* Retire the reads that were answered: nobody asks for them any more. */
static void retire_answered(struct nbdqueue *q)
{
    for (unsigned i = 0; i < q->depth; i++) {
        struct slot *slot = &q->slots[i];
        bool is_left;

        pthread_mutex_lock(&q->lock);
        is_left = slot->is_flying && slot->is_answered && slot->member->is_entered;
        pthread_mutex_unlock(&q->lock);
        if (is_left)
            (void)nbd_aio_command_completed(slot->member->s->h, slot->cookie);
    }
}

/* What libnbd still has of a slot is an orphan from now on.  q->lock is locked. */
static void orphan(struct slot *slot)
{
    struct request *r = slot->request;

    slot->request = NULL;
    if (slot->is_flying && !slot->is_answered && !slot->is_orphan) {
        slot->is_orphan = true;
        atomic_fetch_add(&slot->member->s->orphans, 1);
        atomic_fetch_add(&slot->member->s->orphan_bytes, bytes_of(slot));
    }
    if (r != NULL && --r->flying == 0)
        free(r);
}

static void free_requests(struct request *list)
{
    for (struct request *next; list != NULL; list = next) {
        next = list->next;
        if (list->flying == 0)
            free(list);
    }
}

/* The handle whose call in this thread hands the token over when it ends. */
static struct nbdshim *releaser(const struct nbdqueue *q)
{
    for (size_t i = 0; i < q->count; i++) {
        if (nbdshim_is_reentry(q->members[i].s))
            return q->members[i].s;
    }
    return q->count > 0 ? q->members[0].s : NULL;
}

/* The end of all requests of a queue that was dropped.  The caller has the turn. */
static void forget(struct nbdqueue *q)
{
    retire_answered(q);
    pthread_mutex_lock(&q->lock);
    free_requests(q->queued);
    free_requests(q->done);
    q->queued = q->done = NULL;
    q->length = q->done_length = 0;
    q->answered = NULL;
    q->is_forgotten = true;
    for (unsigned i = 0; i < q->depth; i++)
        orphan(&q->slots[i]);
    if (q->flying == 0)
        release_buffers(q, releaser(q));
    pthread_mutex_unlock(&q->lock);
}

/* Forget everything, give the turn back, and hand the token over if that is the end of it. */
static void forget_and_leave(struct nbdqueue *q)
{
    forget(q);
    end_turn(q);
    if (!is_reentry(q))
        nbdshim_hand_over(releaser(q));
}

int nbdqueue_wait(struct nbdqueue *q, struct nbdqueue_done *done, int room, int least,
                  double timeout)
{
    int64_t until = nbdshim_deadline(timeout);
    unsigned enough = least > 0 ? (unsigned)least : 0;
    int ret = is_reentry(q) ? NBDSHIM_REENTERED : take_turn(q, until);

    if (ret == NBDSHIM_TIMED_OUT)
        return 0;
    if (ret != 0)
        return ret;
    ret = enter_all(q);
    if (ret == 0) {
        (void)reap(q);
        pump(q);
        while (!is_over(q, enough)) {
            ret = move(q, until);
            if (ret < 0)
                return ret; /* without a turn */
            pump(q);
            /* 0 seconds: as long as something has happened; else the time is the limit */
            if ((ret == 0 || timeout > 0) && nbdshim_slice(until) == 0)
                break;
        }
        ret = tell(q, done, room);
    }
    if (ret == NBDSHIM_CLOSED)
        forget_and_leave(q);
    else
        end_turn(q);
    return ret;
}

void nbdqueue_take(struct nbdqueue *q, int count)
{
    pthread_mutex_lock(&q->lock);
    while (count-- > 0 && q->done != NULL) {
        struct request *r = q->done;

        q->done = r->next;
        q->done_length--;
        q->length--;
        free(r);
    }
    if (q->done == NULL)
        q->last_done = &q->done;
    pthread_mutex_unlock(&q->lock);
}

/* What is known at once: that a request cannot be, or has nothing to do.  Returns an errno. */
static int check_range(const struct nbdqueue *q, struct request *r)
{
    const struct end *end = &q->ends[NBDQUEUE_TARGET];
    const struct end *source = &q->ends[NBDQUEUE_SOURCE];

    if (r->operation == NBDQUEUE_FLUSH) {
        r->start = r->cut = 0;
        r->end = 1; /* one piece */
        return 0;
    }
    if (r->end < r->start || r->end > end->size)
        return is_change(r->operation) || r->operation == NBDQUEUE_COPY ? ENOSPC : EINVAL;
    if (r->operation == NBDQUEUE_COPY &&
        (r->end > source->size || r->start % end->minimum != 0 || r->start % source->minimum != 0 ||
         (r->end != end->size && r->end % end->minimum != 0) ||
         (r->end != source->size && r->end % source->minimum != 0)))
        return EINVAL;
    if (r->operation == NBDQUEUE_TRIM) { /* only whole blocks */
        r->cut = r->start + (end->minimum - r->start % end->minimum) % end->minimum;
        if (r->end != end->size)
            r->end = round_down(r->end, end->minimum);
        if (r->cut > r->end)
            r->cut = r->end;
    }
    return 0;
}

/* The largest piece that both ends allow. */
static void settle_piece(struct nbdqueue *q)
{
    uint32_t minimum = 1;

    for (size_t i = 0; i < 2; i++) {
        const struct end *end = &q->ends[i];

        if (end->minimum > minimum)
            minimum = end->minimum;
        if (end->maximum != 0 && end->maximum < q->piece)
            q->piece = end->maximum;
    }
    q->piece = q->piece < minimum ? minimum : (uint32_t)round_down(q->piece, minimum);
}

int nbdqueue_submit(struct nbdqueue *q, enum nbdqueue_operation operation, uintptr_t token,
                    char *buffer, uint64_t length, uint64_t offset, uint32_t flags)
{
    struct request *r;

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
                          .end = offset + length,
                          .flags = flags};
    r->error = check_range(q, r);
    if (r->error != 0) {
        r->error_offset = offset;
        r->cut = r->end;
    }
    pthread_mutex_lock(&q->lock);
    if (q->is_dropped) {
        pthread_mutex_unlock(&q->lock);
        free(r);
        return NBDSHIM_CLOSED;
    }
    if (q->length == 0 && q->flying == 0)
        settle_piece(q);
    *q->last_queued = r;
    q->last_queued = &r->next;
    q->length++;
    pthread_mutex_unlock(&q->lock);
    if (sem_trywait(&q->turn) == 0) {
        if (enter_all(q) == 0)
            pump(q);
        end_turn(q);
    } else {
        pthread_mutex_lock(&q->lock);
        q->has_news = true;
        wake(q);
        pthread_mutex_unlock(&q->lock);
    }
    return 0;
}

void nbdqueue_wake(struct nbdqueue *q)
{
    pthread_mutex_lock(&q->lock);
    q->is_woken = true;
    wake(q);
    pthread_mutex_unlock(&q->lock);
}

unsigned nbdqueue_length(struct nbdqueue *q)
{
    unsigned length;

    pthread_mutex_lock(&q->lock);
    length = q->length;
    pthread_mutex_unlock(&q->lock);
    return length;
}

uint64_t nbdqueue_copied(struct nbdqueue *q)
{
    return atomic_load_explicit(&q->copied, memory_order_relaxed);
}

uint64_t nbdqueue_zeroed(struct nbdqueue *q)
{
    return atomic_load_explicit(&q->zeroed, memory_order_relaxed);
}

/* Mark a queue as dropped, and end the wait of another thread.  Returns whether it was not yet. */
static bool mark_dropped(struct nbdqueue *q)
{
    bool was_dropped;

    pthread_mutex_lock(&q->lock);
    was_dropped = q->is_dropped;
    q->is_dropped = true;
    wake(q);
    pthread_mutex_unlock(&q->lock);
    return !was_dropped;
}

/*
 * Take the turn for the last time.  Who has it gives it back at once.  But in the child of a fork,
 * a thread of the parent may have it: then this returns false.
 */
static bool take_last_turn(struct nbdqueue *q)
{
    if (atomic_load(&nbdshim_forks) != q->forks)
        return sem_trywait(&q->turn) == 0;
    while (sem_wait(&q->turn) != 0)
        ; /* interrupted by a signal */
    return true;
}

void nbdqueue_drop(struct nbdqueue *q)
{
    /* In a callback of a handle this thread may have the turn: then nbdqueue_wait forgets. */
    if (!mark_dropped(q) || is_reentry(q) || !take_last_turn(q))
        return;
    (void)enter_all(q);
    forget_and_leave(q);
}

void nbdqueue_destroy(struct nbdqueue *q)
{
    if (q == NULL)
        return;
    (void)mark_dropped(q);
    if (!take_last_turn(q))
        return; /* its memory stays: it is in the middle of a wait */
    (void)enter_all(q);
    forget_and_leave(q);
    unrefer(q);
}
