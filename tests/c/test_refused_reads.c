// SPDX-License-Identifier: LGPL-2.0-or-later
/* After a read is refused or fails, its buffer has zeroes or is still marked as stale. */
#include "check.h"
#include "tokens.h"
#include "server.h"

#include <string.h>

#define SIZE 4096

static char buffer[SIZE];

/* Each kind of read into `buffer`, which was filled with other bytes before. */
static void check_reads(struct nbdshim *s, int refusal)
{
    struct token tokens[3] = {0};
    int state = NBDSHIM_STALE, expected = refusal == -1 ? NBDSHIM_CLEAN : NBDSHIM_STALE;

    memset(buffer, 'x', SIZE);
    CHECK(nbdcall_pread_into(s, buffer, SIZE, &state, 0, 0) == refusal);
    CHECK(state == expected && nbdshim_is_zero(buffer, SIZE) == (state == NBDSHIM_CLEAN));
    state = NBDSHIM_STALE;
    memset(buffer, 'x', SIZE);
    CHECK(nbdcall_aio_pread(s, buffer, SIZE, &state, 0, give(&tokens[0]), true, 0) == refusal);
    CHECK(state == expected && nbdshim_is_zero(buffer, SIZE) == (state == NBDSHIM_CLEAN));
    memset(buffer, 'x', SIZE);
    state = NBDSHIM_STALE;
    CHECK(nbdcall_aio_pread_structured(s, buffer, SIZE, &state, 0, give(&tokens[1]),
                                       give(&tokens[2]), true, 0) == refusal);
    CHECK(state == expected && nbdshim_is_zero(buffer, SIZE) == (state == NBDSHIM_CLEAN));
    for (int i = 0; i < 3; i++)
        CHECK(tokens[i].calls == 0 && tokens[i].releases == (refusal == -1));
}

static void reads_from_a_closed_handle_show_nothing(void)
{
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdshim_close(s) == 0);
    check_reads(s, NBDSHIM_CLOSED);
    nbdshim_destroy(s);
}

static void reads_that_libnbd_fails_show_nothing(void)
{
    struct nbdshim *s = nbdshim_create();

    check_reads(s, -1);
    nbdshim_destroy(s);
}

static void read_inside(struct token *t)
{
    check_reads(t->data, NBDSHIM_REENTERED);
}

static void reads_inside_a_callback_show_nothing(void)
{
    struct nbdshim *s = connected();
    struct token extent = {.inside = read_inside, .data = s};

    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.calls == 1);
    nbdshim_destroy(s);
}

static void a_read_that_fails_leaves_what_was_given_to_it(void)
{
    struct nbdshim *s = nbdshim_create();
    int state = NBDSHIM_CLEAN;

    memset(buffer, 'x', SIZE);
    CHECK(nbdcall_pread(s, buffer, SIZE, 0, 0) == -1);
    CHECK(nbdcall_pread_into(s, buffer, SIZE, &state, 0, 0) == -1);
    CHECK(nbdshim_close(s) == 0);
    CHECK(nbdcall_pread(s, buffer, SIZE, 0, 0) == NBDSHIM_CLOSED);
    CHECK(buffer[0] == 'x' && buffer[SIZE - 1] == 'x');
    nbdshim_destroy(s);
}

/* Stale bytes are cleared, whatever set_pread_initialize says. */
static void stale_bytes_never_show(void)
{
    for (int initialize = 0; initialize < 2; initialize++) {
        struct nbdshim *s = nbdshim_create();
        struct token held = {0};
        int64_t cookie;
        int state = NBDSHIM_STALE;

        CHECK(nbdcall_set_pread_initialize(s, initialize) == 0);
        memset(buffer, 'x', SIZE);
        cookie = nbdcall_aio_pread(s, buffer, SIZE, &state, 0, give(&held), false, 0);
        CHECK(cookie == -1);
        CHECK(state == NBDSHIM_CLEAN && nbdshim_is_zero(buffer, SIZE));
        CHECK(held.releases == 1);
        nbdshim_destroy(s);
    }
}

static void clean_bytes_are_cleared_unless_set_pread_initialize_says_no(void)
{
    struct nbdshim *s = nbdshim_create();
    int state = NBDSHIM_CLEAN;

    CHECK(nbdcall_get_pread_initialize(s) == 1);
    CHECK(nbdcall_set_pread_initialize(s, false) == 0);
    CHECK(nbdcall_get_pread_initialize(s) == 0);
    memset(buffer, 'x', SIZE);
    CHECK(nbdcall_aio_pread(s, buffer, SIZE, &state, 0, 0, false, 0) == -1);
    CHECK(buffer[0] == 'x' && buffer[SIZE - 1] == 'x');
    CHECK(nbdcall_set_pread_initialize(s, true) == 0);
    CHECK(nbdcall_aio_pread(s, buffer, SIZE, &state, 0, 0, false, 0) == -1);
    CHECK(nbdshim_is_zero(buffer, SIZE));
    nbdshim_destroy(s);
}

RUN_TESTS(TEST(reads_from_a_closed_handle_show_nothing), TEST(reads_that_libnbd_fails_show_nothing),
          TEST(reads_inside_a_callback_show_nothing),
          TEST(a_read_that_fails_leaves_what_was_given_to_it), TEST(stale_bytes_never_show),
          TEST(clean_bytes_are_cleared_unless_set_pread_initialize_says_no))
