// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * Commands that overlap an orphan or a cancelled command wait for it, and no others do.  The number
 * of orphans is limited.  Also: handles that are added to a queue later.
 */
#include "check.h"
#include "rig.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#define READ_TYPE 0
#define WRITE_TYPE 1
#define MAX_ORPHANS 64
#define SHORTLY 0.01
#define ONE_SECOND 1.0

static const char bytes[SIZE];

/* Whether the client has sent a command that was not received yet. */
static bool was_sent(int server)
{
    char byte;

    return recv(server, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 1;
}

/* Receive the next command, which has to be a write of SIZE bytes, and its data. */
static struct command receive_write(int server)
{
    struct command command = receive_command(server);
    char data[SIZE];

    CHECK(command.type == WRITE_TYPE && command.size == SIZE);
    CHECK(recv(server, data, sizeof data, MSG_WAITALL) == sizeof data);
    return command;
}

/* Let the queue send and receive everything that it can. */
static void move(struct rig *rig)
{
    CHECK(nbdqueue_wait(rig->q, rig->done, MAX_DONE, 1, SHORTLY) == 0);
}

/* A rig, and an orphan: the write at offset 0 of a call on its handle that timed out. */
static struct command set_up_after_a_write_that_timed_out(struct rig *rig)
{
    set_up(rig, 4, SIZE);
    CHECK(nbdshim_set_timeout(rig->s, SHORTLY) == 0);
    CHECK(nbdcall_pwrite(rig->s, image, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    return receive_write(rig->server);
}

static void a_call_that_overlaps_a_write_that_was_stopped_is_sent_after_its_answer(void)
{
    struct rig rig;
    struct command write = set_up_after_a_write_that_timed_out(&rig);

    CHECK(nbdcall_pwrite(rig.s, image, SIZE, SIZE - 1, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdcall_pread(rig.s, image, 1, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdcall_zero(rig.s, 1, 1, 0) == NBDSHIM_TIMED_OUT);
    CHECK(!was_sent(rig.server));
    answer(rig.server, write, 0, NULL, 0);
    CHECK(nbdcall_pread(rig.s, image, 1, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(receive_command(rig.server).type == READ_TYPE);
    tear_down(&rig);
}

static void a_call_that_does_not_overlap_it_does_not_wait(void)
{
    struct rig rig;

    (void)set_up_after_a_write_that_timed_out(&rig);
    CHECK(nbdcall_pread(rig.s, image, SIZE, SIZE, 0) == NBDSHIM_TIMED_OUT);
    CHECK(receive_command(rig.server).offset == SIZE);
    CHECK(nbdcall_flush(rig.s, 0) != 0); /* a flush has no range; this server has no flush */
    tear_down(&rig);
}

static void an_orphaned_read_blocks_no_command(void)
{
    struct rig rig;

    set_up(&rig, 4, SIZE);
    CHECK(nbdshim_set_timeout(rig.s, SHORTLY) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(nbdcall_pread(rig.s, image, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
        CHECK(receive_command(rig.server).offset == 0);
    }
    tear_down(&rig);
}

static void a_queue_sends_nothing_over_a_write_that_a_call_has_given_up(void)
{
    struct rig rig;
    struct command write = set_up_after_a_write_that_timed_out(&rig), read;

    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    submit(&rig, NBDQUEUE_READ, 2, SIZE, SIZE);
    read = receive_command(rig.server);
    CHECK(read.offset == SIZE);
    answer(rig.server, read, 0, image, SIZE);
    finish(&rig, 1);
    CHECK(rig.done[0].token == 2);
    move(&rig);
    CHECK(!was_sent(rig.server));
    answer(rig.server, write, 0, NULL, 0);
    move(&rig);
    read = receive_command(rig.server);
    CHECK(read.type == READ_TYPE && read.offset == 0);
    answer(rig.server, read, 0, image, SIZE);
    finish(&rig, 1);
    tear_down(&rig);
}

static void a_queue_sends_nothing_over_a_write_that_was_cancelled(void)
{
    struct rig rig;
    struct command first, second;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_WRITE, 1, SIZE, 0);
    first = receive_write(rig.server);
    nbdqueue_cancel(rig.q, 1);
    submit(&rig, NBDQUEUE_WRITE, 2, SIZE, 0);
    move(&rig);
    CHECK(!was_sent(rig.server));
    answer(rig.server, first, 0, NULL, 0);
    finish(&rig, 1);
    CHECK(rig.done[0].token == 1 && rig.done[0].error == 0);
    second = receive_write(rig.server);
    answer(rig.server, second, 0, NULL, 0);
    finish(&rig, 1);
    CHECK(rig.done[0].token == 2 && rig.done[0].error == 0);
    tear_down(&rig);
}

static void a_blocked_command_can_be_cancelled(void)
{
    struct rig rig;
    struct command first;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_WRITE, 1, SIZE, 0);
    first = receive_write(rig.server);
    nbdqueue_cancel(rig.q, 1);
    submit(&rig, NBDQUEUE_WRITE, 2, SIZE, 0);
    nbdqueue_cancel(rig.q, 2);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, ONE_SECOND) == 1);
    CHECK(rig.done[0].token == 2 && rig.done[0].error == ECANCELED);
    nbdqueue_take(rig.q, rig.done, 1);
    answer(rig.server, first, 0, NULL, 0);
    finish(&rig, 1);
    CHECK(!was_sent(rig.server));
    tear_down(&rig);
}

static void a_queue_sends_nothing_over_a_write_of_one_that_was_dropped(void)
{
    struct rig rig;
    struct token token = {0};
    struct command write, read;
    struct nbdqueue *dropped;

    set_up(&rig, 4, SIZE);
    dropped = nbdqueue_create(1, SIZE, give(&token));
    add(dropped, NBDQUEUE_TARGET, rig.s);
    CHECK(nbdqueue_submit(dropped, NBDQUEUE_WRITE, 1, image, SIZE, 0, 0) == 0);
    write = receive_write(rig.server);
    nbdqueue_destroy(dropped);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    move(&rig);
    CHECK(!was_sent(rig.server));
    answer(rig.server, write, 0, NULL, 0);
    move(&rig);
    read = receive_command(rig.server);
    CHECK(read.type == READ_TYPE);
    CHECK(token.releases == 1);
    tear_down(&rig);
}

static void a_blocked_command_ends_when_its_connection_is_lost(void)
{
    struct rig rig;

    (void)set_up_after_a_write_that_timed_out(&rig);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    CHECK(shutdown(rig.server, SHUT_RDWR) == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 1);
    CHECK(rig.done[0].error != 0);
    tear_down(&rig);
}

static void queues_that_are_dropped_leave_a_bounded_number_of_orphans(void)
{
    enum { QUEUES = 20 };
    struct token tokens[QUEUES] = {{0}};
    struct rig rig;

    set_up(&rig, 1, SIZE);
    for (int i = 0; i < QUEUES; i++) {
        struct nbdqueue *q = nbdqueue_create(MAX_DONE, SIZE, give(&tokens[i]));

        add(q, NBDQUEUE_TARGET, rig.s);
        for (uintptr_t t = 1; t <= MAX_DONE; t++)
            CHECK(nbdqueue_submit(q, NBDQUEUE_READ, t, image, SIZE, 0, 0) == 0);
        nbdqueue_destroy(q);
        CHECK(nbdshim_orphans(rig.s) <= MAX_ORPHANS);
    }
    CHECK(nbdshim_orphans(rig.s) == MAX_ORPHANS);
    tear_down(&rig);
    for (int i = 0; i < QUEUES; i++)
        CHECK(tokens[i].releases == 1);
}

static void what_exceeds_the_orphan_limit_is_sent_when_an_orphan_has_ended(void)
{
    struct rig rig;
    struct command command;

    set_up(&rig, 1, SIZE);
    CHECK(nbdshim_set_timeout(rig.s, SHORTLY / 10) == 0);
    for (int i = 0; i < MAX_ORPHANS; i++)
        CHECK(nbdcall_pread(rig.s, image, 1, 0, 0) == NBDSHIM_TIMED_OUT);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, SIZE);
    move(&rig);
    command = receive_command(rig.server);
    for (int i = 1; i < MAX_ORPHANS; i++)
        (void)receive_command(rig.server);
    CHECK(!was_sent(rig.server));
    answer(rig.server, command, 0, image, 1);
    move(&rig);
    command = receive_command(rig.server);
    CHECK(command.offset == SIZE);
    tear_down(&rig);
}

static void each_request_is_taken_by_its_number(void)
{
    struct rig rig;
    struct nbdqueue_done outer[MAX_DONE];

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    answer(rig.server, receive_command(rig.server), 0, image, SIZE);
    CHECK(nbdqueue_wait(rig.q, outer, MAX_DONE, 1, NO_TIMEOUT) == 1);
    finish(&rig, 1); /* as a signal handler would */
    submit(&rig, NBDQUEUE_READ, 2, SIZE, 0);
    answer(rig.server, receive_command(rig.server), 0, image, SIZE);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 1);
    nbdqueue_take(rig.q, outer, 1);
    CHECK(nbdqueue_length(rig.q) == 1);
    finish(&rig, 1);
    CHECK(rig.done[0].token == 2);
    CHECK(nbdqueue_length(rig.q) == 0);
    tear_down(&rig);
}

static void the_queue_records_when_a_byte_last_moved(void)
{
    struct rig rig;
    struct command command;
    double before;

    set_up(&rig, 4, SIZE);
    CHECK(nbdqueue_last_moved(rig.q) == 0);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    command = receive_command(rig.server);
    move(&rig);
    before = nbdqueue_last_moved(rig.q);
    CHECK(before == 0);
    answer(rig.server, command, 0, image, SIZE / 2); /* half of the data */
    move(&rig);
    CHECK(nbdqueue_last_moved(rig.q) > before);
    tear_down(&rig);
}

/* Another handle, connected to the same kind of server. */
struct another {
    struct nbdshim *s;
    int server;
};

static struct another another(uint64_t size)
{
    struct another made = {.s = nbdshim_create()};

    made.server = connect_to_silence(made.s, size);
    CHECK(nbdcall_set_strict_mode(made.s, 0) == 0);
    return made;
}

static void end_another(struct another *made)
{
    nbdshim_destroy(made->s);
    close(made->server);
}

static void a_handle_that_joins_later_takes_commands(void)
{
    struct another joined = another(DISK_SIZE);
    struct rig rig;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    add(rig.q, NBDQUEUE_TARGET, joined.s);
    submit(&rig, NBDQUEUE_READ, 2, SIZE, SIZE);
    CHECK(receive_command(joined.server).offset == SIZE);
    CHECK(receive_command(rig.server).offset == 0);
    end_another(&joined);
    tear_down(&rig);
}

static void a_handle_to_another_export_does_not_join(void)
{
    struct another other = another(DISK_SIZE / 2);
    struct rig rig;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    CHECK(nbdqueue_add(rig.q, NBDQUEUE_TARGET, other.s) == NBDSHIM_OTHER_EXPORT);
    tear_down(&rig);
    end_another(&other);
}

static void a_queue_takes_at_most_max_handles(void)
{
    struct another others[NBDQUEUE_MAX_HANDLES];
    struct rig rig;

    set_up(&rig, 4, SIZE);
    for (int i = 0; i < NBDQUEUE_MAX_HANDLES; i++) {
        others[i] = another(DISK_SIZE);
        CHECK(nbdqueue_add(rig.q, NBDQUEUE_TARGET, others[i].s) ==
              (i < NBDQUEUE_MAX_HANDLES - 1 ? 0 : NBDSHIM_TOO_MANY));
    }
    tear_down(&rig);
    for (int i = 0; i < NBDQUEUE_MAX_HANDLES; i++)
        end_another(&others[i]);
}

static void *wait_for_one(void *argument)
{
    struct rig *rig = argument;

    CHECK(nbdqueue_wait(rig->q, rig->done, MAX_DONE, 1, NO_TIMEOUT) == 1);
    return NULL;
}

static void a_handle_joins_while_another_thread_waits(void)
{
    struct another joined = another(DISK_SIZE);
    struct pollfd sent = {.fd = joined.server, .events = POLLIN};
    struct command command;
    struct rig rig;
    pthread_t thread;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    CHECK(pthread_create(&thread, NULL, wait_for_one, &rig) == 0);
    add(rig.q, NBDQUEUE_TARGET, joined.s);
    /* The thread sees both at the same time, or the request slightly before the handle. */
    for (int i = 0; i < MAX_DONE / 2 && poll(&sent, 1, 100) == 0; i++)
        submit(&rig, NBDQUEUE_CACHE, 2, SIZE, SIZE);
    CHECK(was_sent(joined.server));
    command = receive_command(rig.server);
    answer(rig.server, command, 0, bytes, SIZE);
    CHECK(pthread_join(thread, NULL) == 0);
    end_another(&joined);
    tear_down(&rig);
}

static void an_export_that_is_too_large_is_refused(void)
{
    struct another large = another(UINT64_C(1) << 63);
    struct token token = {0};
    struct nbdqueue *q = nbdqueue_create(1, SIZE, give(&token));

    CHECK(nbdqueue_add(q, NBDQUEUE_TARGET, large.s) < 0);
    nbdqueue_destroy(q);
    end_another(&large);
}

static void a_queue_that_was_dropped_has_no_descriptor(void)
{
    struct rig rig;
    int before = dup(0), after;

    close(before);
    set_up(&rig, 4, SIZE);
    CHECK(nbdqueue_fd(rig.q) >= 0);
    close(dup(0));
    nbdqueue_drop(rig.q);
    CHECK(nbdqueue_fd(rig.q) == NBDSHIM_CLOSED);
    nbdshim_close(rig.s);
    close(rig.server);
    rig.server = -1;
    after = dup(0);
    CHECK(after == before);
    close(after);
    tear_down(&rig);
}

RUN_TESTS(TEST(a_call_that_overlaps_a_write_that_was_stopped_is_sent_after_its_answer),
          TEST(a_call_that_does_not_overlap_it_does_not_wait),
          TEST(an_orphaned_read_blocks_no_command),
          TEST(a_queue_sends_nothing_over_a_write_that_a_call_has_given_up),
          TEST(a_queue_sends_nothing_over_a_write_that_was_cancelled),
          TEST(a_blocked_command_can_be_cancelled),
          TEST(a_queue_sends_nothing_over_a_write_of_one_that_was_dropped),
          TEST(a_blocked_command_ends_when_its_connection_is_lost),
          TEST(queues_that_are_dropped_leave_a_bounded_number_of_orphans),
          TEST(what_exceeds_the_orphan_limit_is_sent_when_an_orphan_has_ended),
          TEST(each_request_is_taken_by_its_number), TEST(the_queue_records_when_a_byte_last_moved),
          TEST(a_handle_that_joins_later_takes_commands),
          TEST(a_handle_to_another_export_does_not_join), TEST(a_queue_takes_at_most_max_handles),
          TEST(a_handle_joins_while_another_thread_waits),
          TEST(an_export_that_is_too_large_is_refused),
          TEST(a_queue_that_was_dropped_has_no_descriptor))
