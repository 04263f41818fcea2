// SPDX-License-Identifier: LGPL-2.0-or-later
/* One handle, used by many threads. */
#include "check.h"
#include "handle.h"
#include "tokens.h"
#include "server.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>

#define THREADS 8
#define ROUNDS 100

struct shared {
    struct nbdshim *s;
    atomic_int next, unexpected;
};

static void in_threads(struct shared *shared, void *(*work)(void *))
{
    pthread_t threads[THREADS];

    for (int i = 0; i < THREADS; i++)
        REQUIRE(pthread_create(&threads[i], NULL, work, shared) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(shared->unexpected == 0);
}

/* Write a block that contains the thread's number, and read it back with a callback. */
static void *write_and_read(void *argument)
{
    struct shared *shared = argument;
    int number = shared->next++;
    char written[512], got[512];

    memset(written, number + 1, sizeof written);
    for (int i = 0; i < ROUNDS; i++) {
        struct token chunk = {0};
        uint64_t offset = (uint64_t)number * sizeof written;

        memset(got, 0, sizeof got);
        if (nbdcall_pwrite(shared->s, written, sizeof written, offset, 0) != 0 ||
            nbdcall_pread_structured(shared->s, got, sizeof got, offset, give(&chunk), 0) != 0 ||
            memcmp(written, got, sizeof got) != 0 || chunk.size != sizeof got ||
            chunk.releases != 1)
            shared->unexpected++;
    }
    return NULL;
}

static void threads_read_what_they_wrote(void)
{
    struct shared shared = {.s = connected()};

    in_threads(&shared, write_and_read);
    CHECK(atomic_load(&shared.s->users) == 1);
    nbdshim_destroy(shared.s);
}

static void yield_inside(struct token *t)
{
    (void)t;
    sched_yield();
}

/* Calls with and without libnbd's lock, so that debug callbacks run in several threads at once. */
static void *ask(void *argument)
{
    struct shared *shared = argument;

    for (int i = 0; i < ROUNDS; i++) {
        if (nbdcall_aio_is_dead(shared->s) != 0 || nbdcall_get_opt_mode(shared->s) != 0 ||
            nbdshim_check(shared->s) != 0)
            shared->unexpected++;
    }
    return NULL;
}

static void a_debug_callback_in_one_thread_does_not_affect_another(void)
{
    struct shared shared = {.s = nbdshim_create()};
    struct token debug = {.inside = yield_inside};

    CHECK(nbdcall_set_debug_callback(shared.s, give(&debug)) == 0);
    CHECK(nbdcall_set_debug(shared.s, true) == 0);
    in_threads(&shared, ask);
    CHECK(debug.calls >= THREADS * ROUNDS);
    CHECK(nbdshim_check(shared.s) == 0);
    nbdshim_destroy(shared.s);
    CHECK(debug.releases == 1);
}

static void *fail(void *argument)
{
    struct shared *shared = argument;

    if (nbdshim_errno() != 0 || nbdshim_error() != NULL)
        shared->unexpected++;
    if (nbdcall_set_tls(shared->s, 99) != -1 || nbdshim_errno() != EINVAL)
        shared->unexpected++;
    return NULL;
}

static void an_error_is_seen_by_its_thread_alone(void)
{
    struct shared shared = {.s = nbdshim_create()};

    CHECK(nbdcall_get_size(shared.s) == -1);
    CHECK(nbdshim_errno() != EINVAL);
    in_threads(&shared, fail);
    CHECK(nbdshim_errno() != EINVAL);
    CHECK(nbdshim_error() != NULL && strstr(nbdshim_error(), "nbd_get_size") != NULL);
    nbdshim_destroy(shared.s);
}

RUN_TESTS(TEST(threads_read_what_they_wrote),
          TEST(a_debug_callback_in_one_thread_does_not_affect_another),
          TEST(an_error_is_seen_by_its_thread_alone))
