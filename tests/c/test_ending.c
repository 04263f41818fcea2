// SPDX-License-Identifier: LGPL-2.0-or-later
/* At the end of the process, only the thread that ends it makes upcalls. */
#include "check.h"
#include "handle.h"
#include "tokens.h"
#include "server.h"

#include <pthread.h>

struct read {
    struct nbdshim *s;
    struct token chunk;
    int result;
};

static void *read_in_a_thread(void *argument)
{
    struct read *read = argument;
    char buffer[512];

    read->result =
        nbdcall_pread_structured(read->s, buffer, sizeof buffer, 0, give(&read->chunk), 0);
    return NULL;
}

static void other_threads_are_silent(void)
{
    struct read here = {.s = connected()}, there = {.s = here.s};
    pthread_t thread;

    nbdshim_end_other_threads();
    REQUIRE(pthread_create(&thread, NULL, read_in_a_thread, &there) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(there.result == -1);
    CHECK(there.chunk.calls == 0 && there.chunk.releases == 0);
    read_in_a_thread(&here);
    CHECK(here.result == 0);
    CHECK(here.chunk.calls == 1 && here.chunk.releases == 1);
    nbdshim_destroy(here.s);
}

RUN_TESTS(TEST(other_threads_are_silent))
