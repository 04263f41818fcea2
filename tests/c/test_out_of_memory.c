// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * Make every allocation of the shim fail: the first, then the second, and so on, until a scenario
 * runs without a failure.  The linker wraps the allocators (--wrap) in the shim, but not in libnbd.
 */
#include "check.h"
#include "handle.h"
#include "queue.h"
#include "tokens.h"
#include "server.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The number of allocations so far, and which one fails; 0 for none. */
static int allocations, failing;
static bool create_fails;

static bool fails(void)
{
    if (++allocations != failing)
        return false;
    errno = ENOMEM;
    return true;
}

/* The linker resolves NAME to __wrap_NAME, and __real_NAME to the original function. */
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *p, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
char *__real_strdup(const char *text);
struct nbd_handle *__real_nbd_create(void);

void *__wrap_malloc(size_t size)
{
    return fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return fails() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *p, size_t size)
{
    return fails() ? NULL : __real_realloc(p, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return fails() ? NULL : __real_aligned_alloc(alignment, size);
}

char *__wrap_strdup(const char *text)
{
    return fails() ? NULL : __real_strdup(text);
}

struct nbd_handle *__wrap_nbd_create(void)
{
    return create_fails ? NULL : __real_nbd_create();
}

struct scenario {
    struct nbdshim *s;
    char buffer[512];
    struct token tokens[4];
    int used; /* the number of tokens that it passes to calls */
};

typedef int64_t step(struct scenario *sc);

static int64_t create_only(struct scenario *sc)
{
    struct nbdshim *s = nbdshim_create();

    (void)sc;
    if (s == NULL)
        return NBDSHIM_NO_MEMORY;
    nbdshim_destroy(s);
    return 0;
}

static int64_t flush(struct scenario *sc)
{
    return nbdcall_flush(sc->s, 0);
}

static int64_t read_structured(struct scenario *sc)
{
    sc->used = 1;
    return nbdcall_pread_structured(sc->s, sc->buffer, sizeof sc->buffer, 0, give(&sc->tokens[0]),
                                    0);
}

static int64_t read_later(struct scenario *sc)
{
    sc->used = 1;
    return start_read(sc->s, sc->buffer, sizeof sc->buffer, 0, give(&sc->tokens[0]), true);
}

static int64_t read_later_without_callback(struct scenario *sc)
{
    sc->used = 1;
    return start_read(sc->s, sc->buffer, sizeof sc->buffer, 0, give(&sc->tokens[0]), false);
}

static int64_t read_structured_later(struct scenario *sc)
{
    int state = NBDSHIM_STALE;

    sc->used = 2;
    return nbdcall_aio_pread_structured(sc->s, sc->buffer, sizeof sc->buffer, &state, 0,
                                        give(&sc->tokens[0]), give(&sc->tokens[1]), true, 0);
}

static int64_t ask_extents(struct scenario *sc)
{
    sc->used = 1;
    return nbdcall_block_status(sc->s, DISK_SIZE, 0, give(&sc->tokens[0]), 0);
}

static int64_t ask_extents_later(struct scenario *sc)
{
    sc->used = 2;
    return nbdcall_aio_block_status(sc->s, DISK_SIZE, 0, give(&sc->tokens[0]), give(&sc->tokens[1]),
                                    true, 0);
}

static int64_t set_debug_callback(struct scenario *sc)
{
    sc->used = 1;
    return nbdcall_set_debug_callback(sc->s, give(&sc->tokens[0]));
}

static int64_t close_with_commands_in_flight(struct scenario *sc)
{
    int64_t result = read_structured_later(sc);

    CHECK(nbdshim_close(sc->s) == 0);
    return result;
}

static int64_t list_exports(struct scenario *sc)
{
    sc->used = 1;
    return nbdcall_opt_list(sc->s, give(&sc->tokens[0]));
}

static int64_t list_exports_later(struct scenario *sc)
{
    sc->used = 2;
    return nbdcall_aio_opt_list(sc->s, give(&sc->tokens[0]), give(&sc->tokens[1]), true);
}

static int64_t list_contexts(struct scenario *sc)
{
    sc->used = 1;
    return nbdcall_opt_list_meta_context(sc->s, give(&sc->tokens[0]));
}

/* Submit a request and wait for it.  Returns 0 or NBDSHIM_NO_MEMORY. */
static int64_t ask(struct nbdqueue *q, enum nbdqueue_operation operation, uint64_t length)
{
    struct nbdqueue_done done;
    int ret = nbdqueue_submit(q, operation, 1, NULL, length, 0, 0);

    if (ret != 0)
        return ret;
    CHECK(nbdqueue_wait(q, &done, 1, 1, -1) == 1);
    nbdqueue_take(q, &done, 1);
    CHECK(done.error == 0 || done.error == ENOMEM);
    return done.error == 0 ? 0 : NBDSHIM_NO_MEMORY;
}

/* Copy a file to the handle, and zero a file. */
static int64_t use_queues(struct scenario *sc)
{
    struct token tokens[2] = {{0}};
    struct nbdqueue *copy = nbdqueue_create(2, 512, give(&tokens[0]));
    struct nbdqueue *zero = nbdqueue_create(2, 512, give(&tokens[1]));
    int fd = memfd_create("file", MFD_CLOEXEC);
    int64_t result = copy && zero ? 0 : NBDSHIM_NO_MEMORY;

    CHECK(ftruncate(fd, 512) == 0);
    if (result == 0) {
        CHECK(nbdqueue_add(copy, NBDQUEUE_TARGET, sc->s) == 0);
        nbdqueue_add_file(copy, NBDQUEUE_SOURCE, fd, 0, 512);
        nbdqueue_add_file(zero, NBDQUEUE_TARGET, fd, 0, 512);
        result = ask(copy, NBDQUEUE_COPY, 512);
        if (result == 0)
            result = ask(zero, NBDQUEUE_ZERO, 512);
    }
    CHECK(tokens[0].releases == 0 && tokens[1].releases == 0);
    nbdqueue_destroy(copy);
    nbdqueue_destroy(zero);
    CHECK(tokens[0].releases == (copy != NULL) && tokens[1].releases == (zero != NULL));
    close(fd);
    return result;
}

/* Fail the allocations of a scenario one by one, each on a new handle; returns their number. */
static int fail_each(struct nbdshim *(*make)(void), step *run)
{
    for (int i = 1;; i++) {
        struct scenario sc = {.s = make ? make() : NULL};
        int64_t result;
        bool is_untouched;

        memset(sc.buffer, 'x', sizeof sc.buffer);
        allocations = 0;
        failing = i;
        result = run(&sc);
        is_untouched = allocations < failing;
        failing = 0;
        if (is_untouched) {
            CHECK(result >= 0);
        } else {
            CHECK(result == NBDSHIM_NO_MEMORY);
            for (int t = 0; t < sc.used; t++)
                CHECK(sc.tokens[t].calls == 0 && sc.tokens[t].releases == 0);
        }
        if (sc.s && nbdshim_check(sc.s) == 0) {
            CHECK(atomic_load(&sc.s->users) == 1);
            CHECK(nbdcall_get_debug(sc.s) >= 0);
        }
        nbdshim_destroy(sc.s);
        for (int t = 0; t < sc.used; t++)
            CHECK(sc.tokens[t].releases == is_untouched);
        if (is_untouched)
            return i - 1;
    }
}

static void a_handle_needs_one_allocation(void)
{
    CHECK(fail_each(NULL, create_only) == 1);
}

static void a_handle_that_libnbd_cannot_make_is_not_made(void)
{
    create_fails = true;
    CHECK(nbdshim_create() == NULL);
    create_fails = false;
}

static void a_callback_needs_one_allocation(void)
{
    CHECK(fail_each(connected, read_later) == 1);
    CHECK(fail_each(connected, read_later_without_callback) == 1);
    CHECK(fail_each(nbdshim_create, set_debug_callback) == 1);
}

static void a_call_that_waits_needs_one_more(void)
{
    CHECK(fail_each(connected, flush) == 1);
    CHECK(fail_each(connected, read_structured) == 2);
    CHECK(fail_each(connected, ask_extents) == 2);
    CHECK(fail_each(negotiating, list_exports) == 2);
    CHECK(fail_each(negotiating, list_contexts) == 2);
}

static void two_callbacks_need_two_allocations(void)
{
    CHECK(fail_each(connected, read_structured_later) == 2);
    CHECK(fail_each(connected, ask_extents_later) == 2);
    CHECK(fail_each(negotiating, list_exports_later) == 2);
}

static void a_queue_needs_three_allocations_and_each_request_one_and_its_memory(void)
{
    CHECK(fail_each(connected, use_queues) == 2 * (3 + 1 + 1));
}

static void closing_allocates_nothing_but_its_commands(void)
{
    CHECK(fail_each(connected, close_with_commands_in_flight) == 2);
}

RUN_TESTS(TEST(a_handle_needs_one_allocation), TEST(a_handle_that_libnbd_cannot_make_is_not_made),
          TEST(a_callback_needs_one_allocation), TEST(a_call_that_waits_needs_one_more),
          TEST(two_callbacks_need_two_allocations),
          TEST(a_queue_needs_three_allocations_and_each_request_one_and_its_memory),
          TEST(closing_allocates_nothing_but_its_commands))
