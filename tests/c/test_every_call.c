// SPDX-License-Identifier: LGPL-2.0-or-later
/* Every call of libnbd.h, in every state of a handle, either enters and leaves or is refused. */
#include "check.h"
#include "every_call.h"
#include "handle.h"
#include "tokens.h"
#include "server.h"

#include <string.h>

#define NUMBER_OF_CALLS (sizeof calls / sizeof calls[0])

static struct arguments arguments(void)
{
    struct arguments a = {.text = "127.0.0.1", .argv = {"true", NULL}};

    memset(a.buffer, 'x', sizeof a.buffer);
    a.address_size = nbdshim_address_unix(a.address, sizeof a.address, "/nowhere", 8);
    return a;
}

static void check_released_once(const struct call *call, struct arguments *a)
{
    for (int i = 0; i < 2; i++)
        CHECK(a->tokens[i].releases == (i < call->tokens));
}

/* A refused call has not taken its tokens, and a stale buffer is still marked as stale. */
static void check_refused(const struct call *call, struct nbdshim *s, int reason)
{
    struct arguments a = arguments();

    a.state = NBDSHIM_STALE;
    CHECK(call->make(s, &a) == (call->refuses_with_0 ? 0 : reason));
    for (int i = 0; i < call->tokens; i++)
        CHECK(a.tokens[i].calls == 0 && a.tokens[i].releases == 0);
    CHECK(a.state == NBDSHIM_STALE);
}

static void check_enters_and_leaves(const struct call *call, struct nbdshim *s)
{
    struct arguments a = arguments();

    CHECK(atomic_load(&s->users) == 1);
    call->make(s, &a);
    CHECK(atomic_load(&s->users) == 1);
    CHECK(nbdshim_check(s) == 0);
    CHECK(nbdshim_close(s) == 0);
    check_released_once(call, &a);
    nbdshim_destroy(s);
    check_released_once(call, &a);
}

static void every_call_enters_and_leaves_a_new_handle(void)
{
    for (size_t i = 0; i < NUMBER_OF_CALLS; i++) {
        checking(calls[i].name);
        check_enters_and_leaves(&calls[i], nbdshim_create());
    }
}

static void every_call_enters_and_leaves_a_connected_handle(void)
{
    for (size_t i = 0; i < NUMBER_OF_CALLS; i++) {
        checking(calls[i].name);
        check_enters_and_leaves(&calls[i], connected());
    }
}

static void every_call_enters_and_leaves_in_opt_mode(void)
{
    for (size_t i = 0; i < NUMBER_OF_CALLS; i++) {
        checking(calls[i].name);
        check_enters_and_leaves(&calls[i], negotiating());
    }
}

static void every_call_on_a_closed_handle_is_refused(void)
{
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdshim_close(s) == 0);
    for (size_t i = 0; i < NUMBER_OF_CALLS; i++) {
        checking(calls[i].name);
        check_refused(&calls[i], s, NBDSHIM_CLOSED);
    }
    CHECK(nbdshim_check(s) == NBDSHIM_CLOSED);
    CHECK(nbdshim_close(s) == NBDSHIM_CLOSED);
    nbdshim_destroy(s);
}

static void make_every_call(struct token *t)
{
    struct nbdshim *s = t->data;

    for (size_t i = 0; i < NUMBER_OF_CALLS; i++) {
        struct arguments a = arguments();

        checking(calls[i].name);
        if (!calls[i].is_lock_free)
            check_refused(&calls[i], s, NBDSHIM_REENTERED);
        else
            CHECK(calls[i].refuses_with_0 || calls[i].make(s, &a) >= -1);
    }
    checking(NULL);
}

static void every_call_that_takes_the_lock_is_refused_inside_a_callback(void)
{
    struct nbdshim *s = connected();
    struct token extent = {.inside = make_every_call, .data = s};

    CHECK(nbdcall_block_status(s, DISK_SIZE, 0, give(&extent), 0) == 0);
    CHECK(extent.calls == 1);
    CHECK(nbdcall_get_size(s) == DISK_SIZE);
    CHECK(atomic_load(&s->users) == 1);
    nbdshim_destroy(s);
}

RUN_TESTS(TEST(every_call_enters_and_leaves_a_new_handle),
          TEST(every_call_enters_and_leaves_a_connected_handle),
          TEST(every_call_enters_and_leaves_in_opt_mode),
          TEST(every_call_on_a_closed_handle_is_refused),
          TEST(every_call_that_takes_the_lock_is_refused_inside_a_callback))
