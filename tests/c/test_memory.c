// SPDX-License-Identifier: LGPL-2.0-or-later
/* The helpers for buffers: zeroes, stale buffers, and advice to the kernel. */
#include "check.h"
#include "buffer.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE ((size_t)8 << 20)

static void every_nonzero_byte_is_found(void)
{
    char bytes[67] = {0};

    for (size_t size = 0; size <= sizeof bytes; size++)
        CHECK(nbdshim_is_zero(bytes, size));
    for (size_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = 1;
        CHECK(!nbdshim_is_zero(bytes, sizeof bytes));
        CHECK(nbdshim_is_zero(bytes, i));
        CHECK(nbdshim_is_zero(bytes + i + 1, sizeof bytes - i - 1));
        bytes[i] = 0;
    }
}

static void clearing_touches_its_own_bytes_only(void)
{
    char bytes[8];
    int state = NBDSHIM_STALE;

    memset(bytes, 'x', sizeof bytes);
    CHECK(nbdshim_clear_stale(&state, bytes + 2, 3) == 0);
    CHECK(memcmp(bytes, "xx\0\0\0xxx", sizeof bytes) == 0);
    CHECK(state == NBDSHIM_CLEAN);
    state = NBDSHIM_STALE;
    CHECK(nbdshim_clear_stale(&state, bytes, 0) == 0);
    CHECK(bytes[0] == 'x');
}

static void clean_bytes_are_not_cleared(void)
{
    char bytes[8];
    int state = NBDSHIM_CLEAN;

    memset(bytes, 'x', sizeof bytes);
    CHECK(nbdshim_clear_stale(&state, bytes, sizeof bytes) == 0);
    CHECK(memcmp(bytes, "xxxxxxxx", sizeof bytes) == 0);
}

/* Act like a read in another thread: overwrite a claimed buffer, and then mark it as clean. */
static void *overwrite(void *argument)
{
    int *state = argument;

    usleep(20000);
    nbdshim_set_clean(state);
    return NULL;
}

static void clearing_waits_for_another_thread_that_overwrites(void)
{
    char bytes[8] = "read";
    int state = NBDSHIM_STALE;
    pthread_t thread;

    CHECK(nbdshim_claim_stale(&state) && !nbdshim_claim_stale(&state));
    REQUIRE(pthread_create(&thread, NULL, overwrite, &state) == 0);
    CHECK(nbdshim_clear_stale(&state, bytes, sizeof bytes) == 0);
    CHECK(strcmp(bytes, "read") == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void clearing_does_not_wait_for_ever(void)
{
    char bytes[8] = "read";
    int state = NBDSHIM_BUSY;

    CHECK(nbdshim_clear_stale(&state, bytes, sizeof bytes) == -1);
    CHECK(strcmp(bytes, "read") == 0 && state == NBDSHIM_BUSY);
}

static void advice_changes_no_byte(void)
{
    char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    REQUIRE(p != MAP_FAILED);
    memset(p, 'x', SIZE);
    nbdshim_advise_huge(p, SIZE);
    nbdshim_advise_huge(p + 1, SIZE - 2);
    for (size_t i = 0; i < SIZE; i += 4095)
        CHECK(p[i] == 'x');
    CHECK(munmap(p, SIZE) == 0);
}

static void advice_on_less_than_a_page_is_ignored(void)
{
    char bytes[3] = "ab";

    nbdshim_advise_huge(bytes, sizeof bytes);
    nbdshim_advise_huge(bytes, 0);
    nbdshim_advise_huge((char *)1, 1);
    CHECK(strcmp(bytes, "ab") == 0);
}

RUN_TESTS(TEST(every_nonzero_byte_is_found), TEST(clearing_touches_its_own_bytes_only),
          TEST(clean_bytes_are_not_cleared),
          TEST(clearing_waits_for_another_thread_that_overwrites),
          TEST(clearing_does_not_wait_for_ever), TEST(advice_changes_no_byte),
          TEST(advice_on_less_than_a_page_is_ignored))
