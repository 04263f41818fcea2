// SPDX-License-Identifier: LGPL-2.0-or-later
/* Closing a handle, including while other threads are inside its calls. */
#include "check.h"
#include "handle.h"
#include "tokens.h"
#include "server.h"

#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#define THREADS 8
#define ROUNDS 50

static char buffer[512];

static void a_handle_is_closed_once(void)
{
    struct nbdshim *s = connected();

    CHECK(nbdshim_check(s) == 0);
    CHECK(nbdshim_close(s) == 0);
    CHECK(nbdshim_check(s) == NBDSHIM_CLOSED);
    CHECK(nbdshim_close(s) == NBDSHIM_CLOSED);
    nbdshim_destroy(s);
}

static void destroy_closes_an_open_handle(void)
{
    nbdshim_destroy(connected());
    nbdshim_destroy(nbdshim_create());
    nbdshim_destroy(NULL);
}

struct caller {
    struct nbdshim *s;
    int sock;
    int64_t result;
    bool has_message;
};

static void end_call(struct caller *caller, int64_t result)
{
    caller->result = result;
    caller->has_message = nbdshim_error() != NULL;
}

static void *read_in_vain(void *argument)
{
    struct caller *caller = argument;

    end_call(caller, nbdcall_pread(caller->s, buffer, sizeof buffer, 0, 0));
    return NULL;
}

static void *connect_in_vain(void *argument)
{
    struct caller *caller = argument;

    end_call(caller, nbdcall_connect_socket(caller->s, caller->sock));
    return NULL;
}

/* Start a thread, and return when it is inside its call. */
static pthread_t call_in_thread(struct caller *caller, void *(*call)(void *))
{
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, call, caller) == 0);
    while (atomic_load(&caller->s->users) != 2)
        sched_yield();
    return thread;
}

static void check_failed(const struct caller *caller)
{
    CHECK(caller->result == -1);
    CHECK(caller->has_message);
}

static void closing_wakes_a_call_that_waits(void)
{
    struct caller caller = {.s = nbdshim_create()};
    int server = connect_to_silence(caller.s, DISK_SIZE);
    struct token in_flight = {0};
    pthread_t thread;

    CHECK(start_read(caller.s, buffer, sizeof buffer, 0, give(&in_flight), false) > 0);
    thread = call_in_thread(&caller, read_in_vain);
    CHECK(nbdshim_close(caller.s) == 0);
    CHECK(nbdcall_aio_is_dead(caller.s) == NBDSHIM_CLOSED);
    CHECK(pthread_join(thread, NULL) == 0);
    check_failed(&caller);
    CHECK(in_flight.releases == 1);
    nbdshim_destroy(caller.s);
    CHECK(in_flight.releases == 1);
    close(server);
}

/* A running call keeps libnbd's handle open; it is closed when the call returns. */
static void closing_wakes_a_call_that_connects_and_ends_with_it(void)
{
    struct caller caller = {.s = nbdshim_create()};
    struct token debug = {0};
    int ends[2];
    pthread_t thread;

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK(nbdcall_set_debug_callback(caller.s, give(&debug)) == 0);
    caller.sock = ends[0];
    thread = call_in_thread(&caller, connect_in_vain);
    CHECK(nbdshim_close(caller.s) == 0);
    CHECK(nbdcall_aio_is_dead(caller.s) == NBDSHIM_CLOSED);
    CHECK(pthread_join(thread, NULL) == 0);
    close(ends[1]);
    check_failed(&caller);
    CHECK(debug.releases == 1);
    nbdshim_destroy(caller.s);
    CHECK(debug.releases == 1);
}

/* One of many threads, with the token that it passes to each of its calls. */
struct member {
    struct crowd *crowd;
    struct token token;
    int given; /* how often a call has taken the token */
};

struct crowd {
    struct nbdshim *s;
    pthread_barrier_t start;
    atomic_int closed, unexpected;
    struct member members[THREADS];
};

/* Whether the result is a valid one: success, failure because of the close, or refusal after it. */
static bool is_expected(struct crowd *crowd, int result)
{
    return result == 0 || result == NBDSHIM_CLOSED ||
           (result == -1 && nbdshim_check(crowd->s) == NBDSHIM_CLOSED);
}

static void *use_until_closed(void *argument)
{
    struct member *member = argument;
    struct crowd *crowd = member->crowd;
    char buffer[512];

    pthread_barrier_wait(&crowd->start);
    while (nbdshim_check(crowd->s) == 0) {
        uintptr_t token = give(&member->token);
        int result = nbdcall_block_status(crowd->s, DISK_SIZE, 0, token, 0);

        member->given += result != NBDSHIM_CLOSED;
        if (!is_expected(crowd, result) ||
            !is_expected(crowd, nbdcall_pread(crowd->s, buffer, sizeof buffer, 0, 0)))
            crowd->unexpected++;
    }
    return NULL;
}

static void *close_at_once(void *argument)
{
    struct crowd *crowd = ((struct member *)argument)->crowd;
    int result;

    pthread_barrier_wait(&crowd->start);
    result = nbdshim_close(crowd->s);
    if (result == 0)
        crowd->closed++;
    else if (result != NBDSHIM_CLOSED)
        crowd->unexpected++;
    return NULL;
}

static void close_in_a_crowd(struct crowd *crowd)
{
    pthread_t threads[THREADS];

    crowd->s = connected();
    REQUIRE(pthread_barrier_init(&crowd->start, NULL, THREADS) == 0);
    for (int i = 0; i < THREADS; i++) {
        crowd->members[i].crowd = crowd;
        REQUIRE(pthread_create(&threads[i], NULL, i % 2 ? use_until_closed : close_at_once,
                               &crowd->members[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    pthread_barrier_destroy(&crowd->start);
    CHECK(atomic_load(&crowd->s->users) == NBDSHIM_CLOSING);
    nbdshim_destroy(crowd->s);
}

static void closing_in_many_threads_happens_once(void)
{
    for (int round = 0; round < ROUNDS; round++) {
        struct crowd crowd = {0};

        close_in_a_crowd(&crowd);
        CHECK(crowd.closed == 1);
        CHECK(crowd.unexpected == 0);
        for (int i = 0; i < THREADS; i++)
            CHECK(crowd.members[i].token.releases == crowd.members[i].given);
    }
}

RUN_TESTS(TEST(a_handle_is_closed_once), TEST(destroy_closes_an_open_handle),
          TEST(closing_wakes_a_call_that_waits),
          TEST(closing_wakes_a_call_that_connects_and_ends_with_it),
          TEST(closing_in_many_threads_happens_once))
