// SPDX-License-Identifier: LGPL-2.0-or-later
/* Calls from inside a callback on its own handle are refused: libnbd would deadlock. */
#include "check.h"
#include "tokens.h"
#include "server.h"

#include <libnbd.h>

static char buffer[512];

struct handles {
    struct nbdshim *own, *other;
};

/* Calls that would wait for libnbd's lock, which this thread already holds. */
static void try_locking_calls(struct nbdshim *s)
{
    struct token extent = {0}, completion = {0};

    CHECK(nbdshim_check(s) == NBDSHIM_REENTERED);
    CHECK(nbdcall_get_debug(s) == NBDSHIM_REENTERED);
    CHECK(nbdcall_get_size(s) == NBDSHIM_REENTERED);
    CHECK(nbdcall_get_handle_name(s) == NULL);
    CHECK(nbdcall_block_status(s, 512, 0, give(&extent), 0) == NBDSHIM_REENTERED);
    CHECK(start_read(s, buffer, sizeof buffer, 0, give(&completion), true) == NBDSHIM_REENTERED);
    CHECK(extent.releases == 0 && completion.releases == 0);
    CHECK(nbdshim_close(s) == NBDSHIM_REENTERED);
}

static void try_calls(struct token *t)
{
    struct handles *handles = t->data;

    try_locking_calls(handles->own);
    CHECK(nbdshim_check_unlocked(handles->own) == 0);
    CHECK(nbdcall_supports_tls(handles->own) >= 0);
    CHECK(nbdcall_aio_is_dead(handles->own) == 0);
    CHECK(nbdcall_aio_get_direction(handles->own) >= 0);
    CHECK(nbdcall_get_private_data(handles->own) == 7);
    CHECK(nbdcall_get_version(handles->own) != NULL);
    CHECK(nbdshim_check(handles->other) == 0);
    CHECK(nbdcall_get_debug(handles->other) >= 0);
}

/* Every call makes debug callbacks; a call from inside one would recurse without end. */
static void try_calls_while_debugging(struct token *t)
{
    struct handles *handles = t->data;

    try_locking_calls(handles->own);
    CHECK(nbdshim_check_unlocked(handles->own) == NBDSHIM_REENTERED);
    CHECK(nbdcall_supports_tls(handles->own) == NBDSHIM_REENTERED);
    CHECK(nbdcall_aio_is_dead(handles->own) == NBDSHIM_REENTERED);
    CHECK(nbdcall_get_private_data(handles->own) == 0);
    CHECK(nbdcall_get_version(handles->own) == NULL);
    CHECK(nbdshim_check_unlocked(handles->other) == 0);
    CHECK(nbdcall_get_debug(handles->other) >= 0);
}

static struct token trying(struct handles *handles, struct nbdshim *s)
{
    *handles = (struct handles){s, nbdshim_create()};
    CHECK(nbdcall_set_private_data(s, 7) == 0);
    return (struct token){.inside = try_calls, .data = handles};
}

/* After the refusals the handle works as before. */
static void finish(struct handles *handles, const struct token *t)
{
    CHECK(t->calls >= 1);
    CHECK(nbdshim_check(handles->own) == 0);
    CHECK(nbdcall_get_debug(handles->own) >= 0);
    CHECK(nbdshim_close(handles->own) == 0);
    nbdshim_destroy(handles->own);
    nbdshim_destroy(handles->other);
}

static void calls_from_a_chunk_callback_are_refused(void)
{
    struct handles handles;
    struct token chunk = trying(&handles, connected());

    CHECK(nbdcall_pread_structured(handles.own, buffer, sizeof buffer, 0, give(&chunk), 0) == 0);
    CHECK(chunk.releases == 1);
    finish(&handles, &chunk);
}

static void calls_from_a_completion_callback_are_refused(void)
{
    struct handles handles;
    struct token completion = trying(&handles, connected());

    CHECK(start_read(handles.own, buffer, sizeof buffer, 0, give(&completion), true) > 0);
    drain(handles.own);
    finish(&handles, &completion);
    CHECK(completion.releases == 1);
}

static void calls_from_an_extent_callback_are_refused(void)
{
    struct handles handles;
    struct token extent = trying(&handles, connected());

    CHECK(nbdcall_block_status(handles.own, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.releases == 1);
    finish(&handles, &extent);
}

#ifdef LIBNBD_HAVE_NBD_EXTENT64_CALLBACK
static void calls_from_an_extent64_callback_are_refused(void)
{
    struct handles handles;
    struct token extent = trying(&handles, connected());

    CHECK(nbdcall_block_status_64(handles.own, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.releases == 1);
    finish(&handles, &extent);
}
#define TEST_EXTENT64 TEST(calls_from_an_extent64_callback_are_refused),
#else
#define TEST_EXTENT64
#endif

static void calls_from_a_list_callback_are_refused(void)
{
    struct handles handles;
    struct token list = trying(&handles, negotiating());

    CHECK(nbdcall_opt_list(handles.own, give(&list)) == 1);
    CHECK(list.releases == 1);
    finish(&handles, &list);
}

static void calls_from_a_context_callback_are_refused(void)
{
    struct handles handles;
    struct token context = trying(&handles, negotiating());

    CHECK(nbdcall_opt_list_meta_context(handles.own, give(&context)) >= 1);
    CHECK(context.releases == 1);
    finish(&handles, &context);
}

static void every_call_from_a_debug_callback_is_refused(void)
{
    struct handles handles;
    struct token debug = trying(&handles, nbdshim_create());

    debug.inside = try_calls_while_debugging;
    CHECK(nbdcall_set_debug_callback(handles.own, give(&debug)) == 0);
    CHECK(nbdcall_set_debug(handles.own, true) == 0);
    CHECK(nbdcall_get_opt_mode(handles.own) == 0);
    CHECK(debug.calls >= 1);
    debug.calls = 0;
    CHECK(nbdcall_aio_is_dead(handles.own) == 0); /* this call takes no lock */
    CHECK(debug.calls >= 1);
    CHECK(nbdcall_set_debug(handles.own, false) == 0);
    CHECK(nbdcall_clear_debug_callback(handles.own) == 0);
    CHECK(debug.releases == 1);
    finish(&handles, &debug);
}

static void close_in_a_callback_of_another_handle(struct token *t)
{
    CHECK(nbdshim_close(t->data) == 0);
}

static void a_callback_may_close_another_handle(void)
{
    struct nbdshim *s = connected(), *other = connected();
    struct token extent = {.inside = close_in_a_callback_of_another_handle, .data = other};

    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.calls == 1);
    CHECK(nbdcall_get_size(other) == NBDSHIM_CLOSED);
    CHECK(nbdcall_get_size(s) == DISK_SIZE);
    nbdshim_destroy(other);
    nbdshim_destroy(s);
}

static void check_own_and_other(struct token *t)
{
    struct handles *handles = t->data;

    CHECK(nbdshim_check(handles->own) == NBDSHIM_REENTERED);
    CHECK(nbdshim_check(handles->other) == NBDSHIM_REENTERED);
}

static void call_back_on_another_handle(struct token *t)
{
    struct handles *handles = t->data;
    struct token inner = {.inside = check_own_and_other, .data = handles};

    CHECK(nbdcall_block_status(handles->other, DISK_SIZE, 0, give(&inner), 0) == 0);
    CHECK(inner.calls == 1);
    CHECK(nbdshim_check(handles->own) == NBDSHIM_REENTERED);
    CHECK(nbdshim_check(handles->other) == 0);
}

static void callbacks_of_two_handles_nest(void)
{
    struct handles handles = {connected(), connected()};
    struct token outer = {.inside = call_back_on_another_handle, .data = &handles};

    CHECK(nbdcall_block_status(handles.own, DISK_SIZE, 0, give(&outer), 0) == 0);
    CHECK(outer.calls == 1);
    CHECK(nbdshim_check(handles.own) == 0);
    nbdshim_destroy(handles.own);
    nbdshim_destroy(handles.other);
}

/* Tokens are released when libnbd's lock is free. */
static void call_in_release(struct token *t)
{
    CHECK(nbdcall_get_debug(t->data) >= 0);
    CHECK(nbdcall_get_size(t->data) == DISK_SIZE);
    CHECK(nbdcall_supports_tls(t->data) >= 0);
}

static void calls_from_release_are_made(void)
{
    struct nbdshim *s = connected();
    struct token extent = {.released = call_in_release, .data = s};
    struct token completion = extent, failed = extent;
    int64_t cookie = start_read(s, buffer, sizeof buffer, 0, give(&completion), true);

    drain(s);
    CHECK(nbdcall_aio_command_completed(s, (uint64_t)cookie) == 1);
    CHECK(completion.releases == 1);
    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.releases == 1);
    CHECK(nbdcall_block_status(s, 512, DISK_SIZE, give(&failed), 0) == -1);
    CHECK(failed.releases == 1);
    CHECK(nbdcall_get_size(s) == DISK_SIZE);
    nbdshim_destroy(s);
}

static void call_in_closing_release(struct token *t)
{
    CHECK(nbdcall_get_debug(t->data) < -1);
    CHECK(nbdcall_get_private_data(t->data) == 0);
    CHECK(nbdshim_close(t->data) < -1);
}

static void calls_from_release_while_closing_are_refused(void)
{
    struct nbdshim *s = connected();
    struct token completion = {.released = call_in_closing_release, .data = s};

    CHECK(start_read(s, buffer, sizeof buffer, 0, give(&completion), true) > 0);
    CHECK(nbdshim_close(s) == 0);
    CHECK(completion.releases == 1);
    nbdshim_destroy(s);
}

RUN_TESTS(TEST(calls_from_a_chunk_callback_are_refused),
          TEST(calls_from_a_completion_callback_are_refused),
          TEST(calls_from_an_extent_callback_are_refused),
          TEST_EXTENT64 TEST(calls_from_a_list_callback_are_refused),
          TEST(calls_from_a_context_callback_are_refused),
          TEST(every_call_from_a_debug_callback_is_refused),
          TEST(a_callback_may_close_another_handle), TEST(callbacks_of_two_handles_nest),
          TEST(calls_from_release_while_closing_are_refused), TEST(calls_from_release_are_made))
