// SPDX-License-Identifier: LGPL-2.0-or-later
/* A queue in an event loop: its descriptor is ready when nbdqueue_step has something to do. */
#include "check.h"
#include "rig.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* The timeout for events that must happen. */
#define TIMEOUT_MS 10000

static char zeroes[DISK_SIZE];

static bool is_ready(int fd, int milliseconds)
{
    struct pollfd one = {.fd = fd, .events = POLLIN};

    return poll(&one, 1, milliseconds) == 1;
}

/* Act like an event loop: step whenever the descriptor is ready, until `count` are done. */
static void loop_until(struct rig *rig, int fd, int count)
{
    struct nbdqueue_done done[MAX_DONE];
    int found = 0;

    while (found < count && CHECK(is_ready(fd, TIMEOUT_MS))) {
        int now = nbdqueue_step(rig->q, done, MAX_DONE - found);

        if (!CHECK(now >= 0))
            return;
        for (int i = 0; i < now; i++)
            rig->done[found++] = done[i];
        nbdqueue_take(rig->q, done, now);
    }
    CHECK(found == count);
}

/* Step until the descriptor is no longer ready. */
static void step_until_idle(struct rig *rig, int fd)
{
    while (is_ready(fd, 0))
        CHECK(nbdqueue_step(rig->q, rig->done, MAX_DONE) == 0);
}

static void a_loop_ends_each_request_once(void)
{
    struct rig rig;
    int fd;

    set_up_with(&rig, connected(), 4, 16384);
    fd = nbdqueue_fd(rig.q);
    CHECK(fd >= 0);
    for (uintptr_t i = 0; i < 8; i++)
        submit(&rig, NBDQUEUE_READ, i + 1, DISK_SIZE / 8, i * DISK_SIZE / 8);
    loop_until(&rig, fd, 8);
    CHECK(each_ended_once(&rig, 8));
    CHECK(memcmp(image, zeroes, DISK_SIZE) == 0);
    CHECK(!is_ready(fd, 0));
    tear_down(&rig);
}

static void the_descriptor_stays_the_same(void)
{
    struct rig rig;
    int fd;

    set_up_with(&rig, connected(), 4, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    loop_until(&rig, fd, 1);
    CHECK(nbdqueue_fd(rig.q) == fd);
    tear_down(&rig);
}

static void a_step_does_not_wait_for_a_silent_server(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    step_until_idle(&rig, fd);
    CHECK(nbdqueue_step(rig.q, rig.done, MAX_DONE) == 0);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    tear_down(&rig);
}

static void a_request_that_fails_at_once_makes_the_descriptor_ready(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, DISK_SIZE);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].error == EINVAL);
    tear_down(&rig);
}

static void requests_beyond_the_capacity_make_the_descriptor_ready_again(void)
{
    struct rig rig;
    struct nbdqueue_done done;
    int fd;

    set_up(&rig, 4, SIZE);
    fd = nbdqueue_fd(rig.q);
    for (uintptr_t i = 0; i < 4; i++)
        submit(&rig, NBDQUEUE_READ, i + 1, SIZE, DISK_SIZE);
    for (int i = 0; i < 4; i++) {
        CHECK(is_ready(fd, TIMEOUT_MS));
        CHECK(nbdqueue_step(rig.q, &done, 1) == 1);
        rig.done[i] = done;
        rig.done[i].error = 0;
        nbdqueue_take(rig.q, &done, 1);
    }
    CHECK(each_ended_once(&rig, 4));
    CHECK(!is_ready(fd, 0));
    tear_down(&rig);
}

/* The data does not fit into the socket, so libnbd waits until it can send more. */
static void a_large_write_is_sent_while_the_server_reads_slowly(void)
{
    struct rig rig;
    struct command command;
    size_t got = 0;
    int fd;

    set_up(&rig, 1, DISK_SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_WRITE, 1, DISK_SIZE, 0);
    step_until_idle(&rig, fd);
    command = receive_command(rig.server);
    while (got < DISK_SIZE) {
        ssize_t now = recv(rig.server, zeroes, SIZE, MSG_DONTWAIT);

        if (now > 0)
            got += (size_t)now;
        else if (CHECK(is_ready(fd, TIMEOUT_MS)))
            CHECK(nbdqueue_step(rig.q, rig.done, MAX_DONE) == 0);
        else
            break;
    }
    memset(zeroes, 0, sizeof zeroes);
    answer(rig.server, command, 0, NULL, 0);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].error == 0);
    tear_down(&rig);
}

static void the_end_of_an_idle_connection_is_noticed(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    step_until_idle(&rig, fd);
    close(rig.server);
    rig.server = -1;
    CHECK(is_ready(fd, TIMEOUT_MS));
    step_until_idle(&rig, fd);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].error == ENOTCONN);
    CHECK(!is_ready(fd, 0));
    tear_down(&rig);
}

static void a_handle_that_is_closed_ends_its_requests(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, 4 * SIZE, 0);
    step_until_idle(&rig, fd);
    CHECK(nbdshim_close(rig.s) == 0);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].error == ENOTCONN);
    step_until_idle(&rig, fd);
    tear_down(&rig);
}

static void a_request_that_is_cancelled_sends_no_more(void)
{
    struct rig rig;
    struct command first;
    int fd;

    set_up(&rig, 1, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, 4 * SIZE, 0);
    submit(&rig, NBDQUEUE_READ, 2, SIZE, 0);
    first = receive_command(rig.server);
    nbdqueue_cancel(rig.q, 1);
    answer(rig.server, first, 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].token == 1 && rig.done[0].error == ECANCELED);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].token == 2 && rig.done[0].error == 0);
    tear_down(&rig);
}

static void what_was_not_sent_is_cancelled_at_once(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 1, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    submit(&rig, NBDQUEUE_WRITE, 2, SIZE, 0);
    step_until_idle(&rig, fd);
    nbdqueue_cancel(rig.q, 2);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].token == 2 && rig.done[0].error == ECANCELED);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    CHECK(recv(rig.server, zeroes, 1, MSG_DONTWAIT) == -1);
    tear_down(&rig);
}

static void what_was_sent_is_not_cancelled(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 1, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    nbdqueue_cancel(rig.q, 1);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    CHECK(rig.done[0].error == 0);
    tear_down(&rig);
}

static void *read_synchronously(void *argument)
{
    static char bytes[SIZE];

    CHECK(nbdcall_pread(argument, bytes, SIZE, 0, 0) == 0);
    return NULL;
}

/* A thread that waits on the handle also receives replies to the queue's commands. */
static void a_handle_that_another_thread_moves_is_not_watched_for_a_while(void)
{
    struct rig rig;
    struct command commands[2];
    pthread_t thread;
    int fd, steps = 0;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    CHECK(pthread_create(&thread, NULL, read_synchronously, rig.s) == 0);
    commands[0] = receive_command(rig.server);
    commands[1] = receive_command(rig.server);
    for (int i = 0; i < 5; i++) {
        steps += is_ready(fd, 2);
        CHECK(nbdqueue_step(rig.q, rig.done, MAX_DONE) == 0);
    }
    CHECK(steps < 5); /* the event loop does not spin */
    answer(rig.server, commands[0], 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    answer(rig.server, commands[1], 0, zeroes, SIZE);
    CHECK(pthread_join(thread, NULL) == 0);
    submit(&rig, NBDQUEUE_READ, 2, SIZE, 0);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    tear_down(&rig);
}

static void a_queue_that_was_dropped_refuses_steps(void)
{
    struct rig rig;
    int fd;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    nbdqueue_drop(rig.q);
    CHECK(nbdqueue_step(rig.q, rig.done, MAX_DONE) == NBDSHIM_CLOSED);
    CHECK(fd >= 0);
    CHECK(nbdshim_orphans(rig.s) == 1);
    tear_down(&rig);
}

static void a_queue_that_was_destroyed_refuses_everything(void)
{
    struct nbdqueue_done done;

    CHECK(nbdqueue_submit(NULL, NBDQUEUE_FLUSH, 1, NULL, 0, 0, 0) == NBDSHIM_CLOSED);
    CHECK(nbdqueue_wait(NULL, &done, 1, 1, NO_TIMEOUT) == NBDSHIM_CLOSED);
    CHECK(nbdqueue_step(NULL, &done, 1) == NBDSHIM_CLOSED);
    CHECK(nbdqueue_fd(NULL) == NBDSHIM_CLOSED);
    CHECK(nbdqueue_error(NULL, NULL) == 0);
    CHECK(nbdqueue_size(NULL, NBDQUEUE_TARGET) == 0);
    CHECK(nbdqueue_minimum(NULL, NBDQUEUE_TARGET) == 0);
    CHECK(nbdqueue_copied(NULL) == 0);
    CHECK(nbdqueue_zeroed(NULL) == 0);
    nbdqueue_cancel(NULL, 1);
    nbdqueue_wake(NULL);
    nbdqueue_drop(NULL);
}

/* Parent and child share the epoll: the child must not remove the socket from it. */
static void the_child_of_a_fork_leaves_the_descriptor_alone(void)
{
    struct rig rig;
    pid_t child;
    int fd, status = -1;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    step_until_idle(&rig, fd);
    child = fork();
    if (child == 0) {
        alarm(10);
        nbdqueue_drop(rig.q);
        nbdqueue_destroy(rig.q);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

static void ignore(int number)
{
    (void)number;
}

/* Send this process a signal at this interval; 0 stops that. */
static void send_signals(int microseconds)
{
    const struct sigaction action = {.sa_handler = ignore};
    const struct itimerval timer = {.it_interval = {.tv_usec = microseconds},
                                    .it_value = {.tv_usec = microseconds}};

    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

/* A signal can interrupt even a poll that does not sleep. */
static void a_signal_handler_that_raises_ends_a_step_and_nothing_else(void)
{
    struct rig rig;
    int fd, ret = 0;

    set_up(&rig, 2, SIZE);
    fd = nbdqueue_fd(rig.q);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    answer_interrupts(-1);
    send_signals(20);
    for (int i = 0; i < 1000000 && ret == 0; i++)
        ret = nbdqueue_step(rig.q, rig.done, MAX_DONE);
    send_signals(0);
    answer_interrupts(0);
    CHECK(ret == NBDSHIM_STOPPED);
    answer(rig.server, receive_command(rig.server), 0, zeroes, SIZE);
    loop_until(&rig, fd, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

RUN_TESTS(TEST(a_loop_ends_each_request_once), TEST(the_descriptor_stays_the_same),
          TEST(a_step_does_not_wait_for_a_silent_server),
          TEST(a_request_that_fails_at_once_makes_the_descriptor_ready),
          TEST(requests_beyond_the_capacity_make_the_descriptor_ready_again),
          TEST(a_large_write_is_sent_while_the_server_reads_slowly),
          TEST(the_end_of_an_idle_connection_is_noticed),
          TEST(a_handle_that_is_closed_ends_its_requests),
          TEST(a_request_that_is_cancelled_sends_no_more),
          TEST(what_was_not_sent_is_cancelled_at_once), TEST(what_was_sent_is_not_cancelled),
          TEST(a_handle_that_another_thread_moves_is_not_watched_for_a_while),
          TEST(a_queue_that_was_dropped_refuses_steps),
          TEST(a_queue_that_was_destroyed_refuses_everything),
          TEST(the_child_of_a_fork_leaves_the_descriptor_alone),
          TEST(a_signal_handler_that_raises_ends_a_step_and_nothing_else))
