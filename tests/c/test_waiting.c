// SPDX-License-Identifier: LGPL-2.0-or-later
/* Calls that a timeout or a signal stops, and the orphans that they leave behind. */
#include "check.h"
#include "handle.h"
#include "tokens.h"
#include "server.h"

#include <endian.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE 512
#define THREADS 4
#define ROUNDS 200

static char buffer[SIZE];

/* A handle to a server that never replies by itself. */
struct silence {
    struct nbdshim *s;
    int server;
};

static struct silence silence(double timeout)
{
    struct silence made = {.s = nbdshim_create()};

    made.server = connect_to_silence(made.s, DISK_SIZE);
    CHECK(nbdshim_set_timeout(made.s, timeout) == 0);
    return made;
}

static void end_silence(struct silence *made)
{
    nbdshim_destroy(made->s);
    close(made->server);
}

static void receive(int server, void *bytes, size_t size)
{
    for (size_t got = 0; got < size;) {
        ssize_t more = recv(server, (char *)bytes + got, size - got, 0);

        REQUIRE(more > 0);
        got += (size_t)more;
    }
}

/* Reply to the next read that the server has received, with SIZE bytes. */
static void answer_read(int server)
{
    struct {
        uint32_t magic, command;
        uint64_t cookie, offset;
        uint32_t size;
    } __attribute__((packed)) request;
    struct {
        uint32_t magic, error;
        uint64_t cookie;
        char data[SIZE];
    } __attribute__((packed)) reply = {.magic = htobe32(0x67446698)};

    receive(server, &request, sizeof request);
    reply.cookie = request.cookie;
    memset(reply.data, 'x', sizeof reply.data);
    CHECK(send(server, &reply, sizeof reply, 0) == sizeof reply);
}

static void *answer_in_thread(void *argument)
{
    const int *server = argument;

    usleep(50000);
    answer_read(*server);
    return NULL;
}

/* Reply later than the timeout of the handles in this file. */
static void answer_read_later(int server)
{
    static int answering;
    pthread_t thread;

    answering = server;
    CHECK(pthread_create(&thread, NULL, answer_in_thread, &answering) == 0);
    CHECK(pthread_detach(thread) == 0);
}

static void a_deadline_makes_an_orphan_that_keeps_its_buffer_until_the_end(void)
{
    struct silence silent = silence(0.01);

    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdshim_orphans(silent.s) == 1);
    CHECK(kept_buffers() == 1);
    end_silence(&silent);
    CHECK(kept_buffers() == 0);
}

static void a_late_answer_ends_the_orphan(void)
{
    struct silence silent = silence(0.01);

    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    answer_read(silent.server);
    CHECK(nbdcall_poll(silent.s, -1) == 1);
    CHECK(nbdshim_orphans(silent.s) == 0);
    CHECK(kept_buffers() == 0);
    CHECK(buffer[0] == 'x' && buffer[SIZE - 1] == 'x');
    end_silence(&silent);
}

static void a_call_that_ends_normally_keeps_no_buffer(void)
{
    struct nbdshim *s = connected();

    CHECK(nbdcall_pread(s, buffer, SIZE, 0, 0) == 0);
    CHECK(nbdcall_pread(s, buffer, SIZE, DISK_SIZE, 0) == -1);
    CHECK(kept_buffers() == 0);
    nbdshim_destroy(s);
}

static void a_buffer_that_cannot_be_kept_at_first_is_kept_later(void)
{
    struct silence silent = silence(0.01);

    fail_to_keep(150);
    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(kept_buffers() == 1);
    end_silence(&silent);
    CHECK(kept_buffers() == 0);
}

static void a_read_whose_buffer_cannot_be_kept_waits_for_the_answer(void)
{
    struct silence silent = silence(0.01);

    fail_to_keep(INT_MAX);
    answer_read_later(silent.server);
    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == 0);
    fail_to_keep(0);
    CHECK(buffer[0] == 'x');
    CHECK(nbdshim_orphans(silent.s) == 0);
    end_silence(&silent);
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

static void a_signal_handler_that_raises_stops_every_wait(void)
{
    struct silence silent = silence(0);
    struct token chunk = {0};

    answer_interrupts(-1);
    send_signals(5000);
    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_STOPPED);
    CHECK(nbdcall_pread_structured(silent.s, buffer, SIZE, 0, give(&chunk), 0) == NBDSHIM_STOPPED);
    CHECK(nbdcall_pwrite(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_STOPPED);
    CHECK(nbdcall_poll(silent.s, -1) == NBDSHIM_STOPPED);
    CHECK(nbdcall_shutdown(silent.s, 0) == NBDSHIM_STOPPED);
    send_signals(0);
    answer_interrupts(0);
    CHECK(nbdshim_orphans(silent.s) == 3);
    CHECK(kept_buffers() == 2);
    end_silence(&silent);
    CHECK(kept_buffers() == 0);
    CHECK(chunk.releases == 1 && chunk.calls == 0);
}

static void a_wait_continues_after_a_signal_handler_that_does_not_raise(void)
{
    struct silence silent = silence(0.05);

    send_signals(1000);
    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    send_signals(0);
    end_silence(&silent);
}

static void an_orphan_is_not_called_back(void)
{
    struct nbdshim *s = nbdshim_create();
    struct token chunk = {0};
    pid_t server = connect_to_child(s);

    CHECK(kill(server, SIGSTOP) == 0);
    CHECK(waitpid(server, NULL, WUNTRACED) == server); /* all threads of the server have stopped */
    CHECK(nbdshim_set_timeout(s, 0.01) == 0);
    CHECK(nbdcall_pread_structured(s, buffer, SIZE, 0, give(&chunk), 0) == NBDSHIM_TIMED_OUT);
    CHECK(chunk.releases == 0);
    CHECK(kill(server, SIGCONT) == 0);
    CHECK(nbdshim_set_timeout(s, 0) == 0);
    while (nbdshim_orphans(s) != 0)
        REQUIRE(nbdcall_poll(s, -1) == 1);
    CHECK(nbdcall_pread(s, buffer, SIZE, 0, 0) == 0);
    CHECK(chunk.calls == 0);
    CHECK(chunk.releases == 1);
    nbdshim_destroy(s);
    kill_server(server);
}

static void orphans_are_bounded_by_number(void)
{
    struct silence silent = silence(0.001);

    for (int i = 0; i < 100; i++)
        CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdshim_orphans(silent.s) == 64);
    answer_read(silent.server);
    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdshim_orphans(silent.s) == 64);
    end_silence(&silent);
}

static void orphans_are_bounded_by_bytes(void)
{
    static char large[32 << 20];
    struct silence silent = silence(0.001);

    CHECK(nbdcall_set_strict_mode(silent.s, 0) == 0);
    for (int i = 0; i < 5; i++)
        CHECK(nbdcall_pread(silent.s, large, sizeof large, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdshim_orphans(silent.s) == 2);
    end_silence(&silent);
}

static void a_connect_that_was_stopped_is_finished_by_the_next_call(void)
{
    struct nbdshim *s = nbdshim_create();
    const struct {
        uint64_t magic, version, size;
        uint32_t flags;
        char zeroes[124];
    } __attribute__((packed)) oldstyle = {htobe64(0x4e42444d41474943),
                                          htobe64(0x00420281861253),
                                          htobe64(DISK_SIZE),
                                          htobe32(1),
                                          {0}};
    int ends[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK(nbdshim_set_timeout(s, 0.01) == 0);
    CHECK(nbdcall_connect_socket(s, ends[0]) == NBDSHIM_TIMED_OUT);
    CHECK(nbdcall_aio_is_connecting(s) == 1);
    CHECK(send(ends[1], &oldstyle, sizeof oldstyle, 0) == sizeof oldstyle);
    CHECK(nbdcall_pread(s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdcall_aio_is_connecting(s) == 0);
    CHECK(nbdshim_orphans(s) == 1);
    nbdshim_destroy(s);
    close(ends[1]);
}

static void *poll_for_ever(void *argument)
{
    (void)nbdcall_poll(argument, -1);
    return NULL;
}

static void a_wait_for_the_turn_can_be_stopped(void)
{
    struct silence silent = silence(0);
    pthread_t thread;

    CHECK(start_read(silent.s, buffer, SIZE, 0, 0, false) > 0);
    CHECK(pthread_create(&thread, NULL, poll_for_ever, silent.s) == 0);
    while (atomic_load(&silent.s->users) != 2)
        sched_yield();
    CHECK(nbdshim_set_timeout(silent.s, 0.01) == 0);
    CHECK(nbdcall_pread(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdshim_close(silent.s) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    end_silence(&silent);
}

struct crowd {
    struct nbdshim *s;
    atomic_int late, good, reads;
    atomic_bool is_over;
};

static void *read_in_time_or_not(void *argument)
{
    static char memory[THREADS * ROUNDS][SIZE]; /* an orphan may still write to its buffer */
    struct crowd *crowd = argument;

    for (int i = 0; i < ROUNDS; i++) {
        int ret = nbdcall_pread(crowd->s, memory[crowd->reads++], SIZE, 0, 0);

        if (ret == NBDSHIM_TIMED_OUT) {
            crowd->late++;
        } else {
            CHECK(ret == 0);
            crowd->good++;
        }
    }
    return NULL;
}

static void *move_the_connection(void *argument)
{
    struct crowd *crowd = argument;

    while (!crowd->is_over) {
        (void)nbdcall_poll(crowd->s, 1);
        sched_yield();
    }
    return NULL;
}

static void a_poll_does_not_wait_longer_for_its_turn(void)
{
    struct silence silent = silence(0);
    pthread_t thread;

    CHECK(start_read(silent.s, buffer, SIZE, 0, 0, false) > 0);
    CHECK(pthread_create(&thread, NULL, poll_for_ever, silent.s) == 0);
    while (atomic_load(&silent.s->users) != 2)
        sched_yield();
    CHECK(nbdcall_poll(silent.s, 10) == 0);
    CHECK(nbdcall_poll(silent.s, 0) == 0);
    CHECK(nbdshim_close(silent.s) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    end_silence(&silent);
}

static void threads_with_deadlines_share_a_handle(void)
{
    struct crowd crowd = {.s = connected()};
    pthread_t threads[THREADS], mover;

    CHECK(nbdshim_set_timeout(crowd.s, 0.0001) == 0);
    CHECK(pthread_create(&mover, NULL, move_the_connection, &crowd) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, read_in_time_or_not, &crowd) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    crowd.is_over = true;
    CHECK(pthread_join(mover, NULL) == 0);
    CHECK(nbdshim_set_timeout(crowd.s, 0) == 0);
    while (nbdshim_orphans(crowd.s) != 0)
        REQUIRE(nbdcall_poll(crowd.s, -1) == 1);
    CHECK(nbdcall_pread(crowd.s, buffer, SIZE, 0, 0) == 0);
    CHECK(crowd.late + crowd.good == THREADS * ROUNDS);
    CHECK(kept_buffers() == 0);
    nbdshim_destroy(crowd.s);
}

static void closing_does_not_wait_for_orphans(void)
{
    struct silence silent = silence(0.001);

    for (int i = 0; i < 8; i++)
        CHECK(nbdcall_pwrite(silent.s, buffer, SIZE, 0, 0) == NBDSHIM_TIMED_OUT);
    CHECK(nbdshim_close(silent.s) == 0);
    CHECK(kept_buffers() == 0);
    end_silence(&silent);
}

static void each_handle_has_its_own_timeout(void)
{
    struct nbdshim *one = nbdshim_create(), *other = nbdshim_create();

    CHECK(nbdshim_timeout(one) == 0);
    CHECK(nbdshim_set_timeout(one, 2.5) == 0);
    CHECK(nbdshim_timeout(one) == 2.5);
    CHECK(nbdshim_timeout(other) == 0);
    nbdshim_destroy(other);
    CHECK(nbdshim_close(one) == 0);
    CHECK(nbdshim_set_timeout(one, 1) == NBDSHIM_CLOSED);
    CHECK(nbdshim_timeout(one) == NBDSHIM_CLOSED);
    nbdshim_destroy(one);
}

RUN_TESTS(TEST(a_deadline_makes_an_orphan_that_keeps_its_buffer_until_the_end),
          TEST(a_late_answer_ends_the_orphan), TEST(a_call_that_ends_normally_keeps_no_buffer),
          TEST(a_buffer_that_cannot_be_kept_at_first_is_kept_later),
          TEST(a_read_whose_buffer_cannot_be_kept_waits_for_the_answer),
          TEST(a_signal_handler_that_raises_stops_every_wait),
          TEST(a_wait_continues_after_a_signal_handler_that_does_not_raise),
          TEST(an_orphan_is_not_called_back), TEST(orphans_are_bounded_by_number),
          TEST(orphans_are_bounded_by_bytes),
          TEST(a_connect_that_was_stopped_is_finished_by_the_next_call),
          TEST(a_wait_for_the_turn_can_be_stopped), TEST(a_poll_does_not_wait_longer_for_its_turn),
          TEST(threads_with_deadlines_share_a_handle), TEST(closing_does_not_wait_for_orphans),
          TEST(each_handle_has_its_own_timeout))
