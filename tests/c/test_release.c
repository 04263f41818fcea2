// SPDX-License-Identifier: LGPL-2.0-or-later
/* Every token is released exactly once, however its call ends. */
#include "check.h"
#include "tokens.h"
#include "server.h"

#include <unistd.h>

#define BEYOND (2 * (uint64_t)DISK_SIZE)

static char buffer[512];

static int64_t start(struct nbdshim *s, uint64_t offset, struct token *t, bool is_called)
{
    return start_read(s, buffer, sizeof buffer, offset, give(t), is_called);
}

static void a_call_that_waits_releases_before_it_returns(void)
{
    struct nbdshim *s = connected();
    struct token extent = {0};

    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.calls == 1 && extent.size == 1);
    CHECK(extent.releases == 1);
    nbdshim_destroy(s);
    CHECK(extent.releases == 1);
}

static void a_call_that_fails_releases(void)
{
    struct nbdshim *s = connected();
    struct token extent = {0};

    CHECK(nbdcall_block_status(s, BEYOND, 0, give(&extent), 0) == -1);
    CHECK(extent.calls == 0);
    CHECK(extent.releases == 1);
    nbdshim_destroy(s);
    CHECK(extent.releases == 1);
}

static void a_callback_that_fails_its_call_is_released_once(void)
{
    struct nbdshim *s = connected();
    struct token extent = {.answer = -1};

    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == -1);
    CHECK(extent.calls == 1);
    CHECK(extent.releases == 1);
    nbdshim_destroy(s);
    CHECK(extent.releases == 1);
}

static void a_command_releases_its_token_when_it_is_retired(void)
{
    struct nbdshim *s = connected();
    struct token completion = {0};
    int64_t cookie = start(s, 0, &completion, true);

    CHECK(cookie > 0);
    CHECK(completion.releases == 0);
    drain(s);
    CHECK(completion.calls == 1 && completion.error == 0);
    CHECK(nbdcall_aio_command_completed(s, (uint64_t)cookie) == 1);
    CHECK(completion.releases == 1);
    nbdshim_destroy(s);
    CHECK(completion.releases == 1);
}

static void a_command_that_is_never_retired_releases_its_token_at_close(void)
{
    struct nbdshim *s = connected();
    struct token completion = {0};

    CHECK(start(s, 0, &completion, true) > 0);
    drain(s);
    CHECK(completion.calls == 1);
    CHECK(nbdshim_close(s) == 0);
    CHECK(completion.calls == 1);
    CHECK(completion.releases == 1);
    nbdshim_destroy(s);
    CHECK(completion.releases == 1);
}

static void a_completion_that_returned_1_has_released_its_token(void)
{
    struct nbdshim *s = connected();
    struct token completion = {.answer = 1};
    int64_t cookie = start(s, 0, &completion, true);

    drain(s);
    CHECK(completion.calls == 1);
    CHECK(nbdcall_aio_command_completed(s, (uint64_t)cookie) != 1);
    nbdshim_destroy(s);
    CHECK(completion.releases == 0);
}

static void a_completion_that_returned_1_releases_no_other_token(void)
{
    struct nbdshim *s = connected();
    struct token chunk = {0}, completion = {.answer = 1};
    int state = NBDSHIM_CLEAN;

    CHECK(nbdcall_aio_pread_structured(s, buffer, sizeof buffer, &state, 0, give(&chunk),
                                       give(&completion), true, 0) > 0);
    drain(s);
    CHECK(chunk.calls == 1 && chunk.size == sizeof buffer);
    CHECK(completion.calls == 1);
    CHECK(chunk.releases == 1);
    CHECK(completion.releases == 0);
    nbdshim_destroy(s);
    CHECK(chunk.releases == 1);
}

static void a_chunk_callback_that_returned_1_is_released(void)
{
    struct nbdshim *s = connected();
    struct token chunk = {.answer = 1};

    CHECK(nbdcall_pread_structured(s, buffer, sizeof buffer, 0, give(&chunk), 0) == 0);
    CHECK(chunk.calls == 1);
    CHECK(chunk.releases == 1);
    nbdshim_destroy(s);
    CHECK(chunk.releases == 1);
}

static void a_token_without_callback_is_released_when_the_command_retires(void)
{
    struct nbdshim *s = connected();
    struct token held = {0};
    int64_t cookie = start(s, 0, &held, false);

    CHECK(cookie > 0);
    drain(s);
    CHECK(held.releases == 0);
    CHECK(nbdcall_aio_command_completed(s, (uint64_t)cookie) == 1);
    CHECK(held.calls == 0);
    CHECK(held.releases == 1);
    nbdshim_destroy(s);
    CHECK(held.releases == 1);
}

static void a_token_without_callback_is_released_if_its_call_fails(void)
{
    struct nbdshim *s = connected();
    struct token held = {0};

    CHECK(start(s, BEYOND, &held, false) == -1);
    CHECK(held.calls == 0);
    CHECK(held.releases == 1);
    nbdshim_destroy(s);
    CHECK(held.releases == 1);
}

static void no_token_and_no_callback_is_accepted(void)
{
    struct nbdshim *s = connected();
    int64_t cookie = nbdcall_aio_flush(s, 0, false, 0);

    CHECK(cookie > 0);
    drain(s);
    CHECK(nbdcall_aio_command_completed(s, (uint64_t)cookie) == 1);
    nbdshim_destroy(s);
}

static void closing_releases_what_is_in_flight(void)
{
    struct nbdshim *s = nbdshim_create();
    int server = connect_to_silence(s, DISK_SIZE);
    struct token called[8] = {0}, held[8] = {0};

    for (int i = 0; i < 8; i++) {
        CHECK(start(s, 0, &called[i], true) > 0);
        CHECK(start(s, 0, &held[i], false) > 0);
    }
    CHECK(nbdshim_close(s) == 0);
    for (int i = 0; i < 8; i++) {
        CHECK(called[i].releases == 1);
        CHECK(held[i].releases == 1 && held[i].calls == 0);
    }
    nbdshim_destroy(s);
    close(server);
    for (int i = 0; i < 8; i++) {
        CHECK(called[i].releases == 1);
        CHECK(held[i].releases == 1);
    }
}

static void destroying_releases_what_is_in_flight(void)
{
    struct nbdshim *s = nbdshim_create();
    int server = connect_to_silence(s, DISK_SIZE);
    struct token completion = {0};

    CHECK(start(s, 0, &completion, true) > 0);
    nbdshim_destroy(s);
    close(server);
    CHECK(completion.releases == 1);
}

static void another_debug_callback_releases_the_one_before(void)
{
    struct nbdshim *s = nbdshim_create();
    struct token first = {0}, second = {0};

    CHECK(nbdcall_set_debug_callback(s, give(&first)) == 0);
    CHECK(nbdcall_set_debug_callback(s, give(&second)) == 0);
    CHECK(first.releases == 1 && second.releases == 0);
    CHECK(nbdcall_clear_debug_callback(s) == 0);
    CHECK(second.releases == 1);
    nbdshim_destroy(s);
    CHECK(first.releases == 1 && second.releases == 1);
}

static void a_release_that_fails_is_tried_again_at_once(void)
{
    struct nbdshim *s = connected();
    struct token extent = {0};

    fail_releases(2);
    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.releases == 1);
    nbdshim_destroy(s);
}

static void a_release_that_fails_for_long_is_tried_again_by_later_calls(void)
{
    struct nbdshim *s = connected();
    struct token extents[100] = {0};

    fail_releases(1000);
    for (int i = 0; i < 100; i++)
        CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extents[i]), 0) == 0);
    for (int i = 0; i < 100; i++)
        CHECK(extents[i].releases == 0);
    fail_releases(0);
    CHECK(nbdcall_get_size(s) == DISK_SIZE);
    for (int i = 0; i < 100; i++)
        CHECK(extents[i].releases == 1);
    nbdshim_destroy(s);
}

static void a_release_that_never_succeeds_leaks_nothing(void)
{
    struct nbdshim *s = connected();
    struct token extent = {0};

    fail_releases(1000);
    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    nbdshim_destroy(s);
    fail_releases(0);
    CHECK(extent.releases == 0);
}

static void a_token_is_held_from_its_call_until_libnbd_has_freed_it(void)
{
    struct nbdshim *s = connected();
    struct token completion = {0}, refused = {0}, debug = {0};
    int64_t cookie = start(s, 0, &completion, true);

    CHECK(nbdcall_set_debug_callback(s, give(&debug)) == 0);
    CHECK(nbdshim_holds(s, give(&completion)) && nbdshim_holds(s, give(&debug)));
    drain(s);
    CHECK(nbdshim_holds(s, give(&completion)));
    CHECK(nbdcall_aio_command_completed(s, (uint64_t)cookie) == 1);
    CHECK(!nbdshim_holds(s, give(&completion)) && nbdshim_holds(s, give(&debug)));
    CHECK(start(s, BEYOND, &refused, true) == -1);
    CHECK(!nbdshim_holds(s, give(&refused)));
    CHECK(nbdshim_close(s) == 0);
    CHECK(!nbdshim_holds(s, give(&debug)));
    CHECK(start(s, 0, &refused, true) == NBDSHIM_CLOSED);
    CHECK(!nbdshim_holds(s, give(&refused)) && refused.releases == 1);
    nbdshim_destroy(s);
    CHECK(!nbdshim_holds(NULL, 1));
}

static void a_killed_server_completes_and_releases_every_command(void)
{
    struct nbdshim *s = nbdshim_create();
    pid_t server = connect_to_child(s);
    struct token completions[64] = {0};

    for (int i = 0; i < 64; i++) {
        completions[i].answer = i % 2; /* every second one returns 1 and retires its command */
        if (i == 32)
            kill_server(server);
        if (start(s, 0, &completions[i], true) == -1)
            CHECK(completions[i].releases == 1);
    }
    drain(s);
    CHECK(nbdcall_aio_is_dead(s) == 1 || nbdcall_aio_is_closed(s) == 1);
    nbdshim_destroy(s);
    for (int i = 0; i < 64; i++) {
        struct token *t = &completions[i];
        int retired = t->calls && t->answer == 1;

        CHECK(t->calls <= 1);
        CHECK(t->releases == 1 - retired);
    }
}

RUN_TESTS(TEST(a_call_that_waits_releases_before_it_returns), TEST(a_call_that_fails_releases),
          TEST(a_callback_that_fails_its_call_is_released_once),
          TEST(a_command_releases_its_token_when_it_is_retired),
          TEST(a_command_that_is_never_retired_releases_its_token_at_close),
          TEST(a_completion_that_returned_1_has_released_its_token),
          TEST(a_completion_that_returned_1_releases_no_other_token),
          TEST(a_chunk_callback_that_returned_1_is_released),
          TEST(a_token_without_callback_is_released_when_the_command_retires),
          TEST(a_token_without_callback_is_released_if_its_call_fails),
          TEST(no_token_and_no_callback_is_accepted), TEST(closing_releases_what_is_in_flight),
          TEST(destroying_releases_what_is_in_flight),
          TEST(another_debug_callback_releases_the_one_before),
          TEST(a_release_that_fails_is_tried_again_at_once),
          TEST(a_release_that_fails_for_long_is_tried_again_by_later_calls),
          TEST(a_release_that_never_succeeds_leaks_nothing),
          TEST(a_token_is_held_from_its_call_until_libnbd_has_freed_it),
          TEST(a_killed_server_completes_and_releases_every_command))
