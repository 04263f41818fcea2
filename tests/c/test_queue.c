// SPDX-License-Identifier: LGPL-2.0-or-later
/* A queue of requests: how it does them, and the state after a drop, a close or a signal. */
#include "check.h"
#include "rig.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK 4096

static char other_image[DISK_SIZE];

/* Fill a disk so that no two neighbouring sectors are equal. */
static void fill(char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        bytes[i] = (char)(1 + (i / 512 + i) % 251);
}

static void store(struct nbdshim *s, const char *bytes)
{
    CHECK(nbdcall_pwrite(s, bytes, DISK_SIZE, 0, 0) == 0);
}

static void load(struct nbdshim *s, char *bytes)
{
    CHECK(nbdcall_pread(s, bytes, DISK_SIZE, 0, 0) == 0);
}

static void reads_end_once_with_the_right_data(void)
{
    struct rig rig;

    set_up_with(&rig, connected(), 4, 16384);
    fill(other_image, DISK_SIZE);
    store(rig.s, other_image);
    memset(image, 0, sizeof image);
    for (uintptr_t i = 0; i < 8; i++)
        submit(&rig, NBDQUEUE_READ, i + 1, DISK_SIZE / 8, i * DISK_SIZE / 8);
    finish(&rig, 8);
    CHECK(each_ended_once(&rig, 8));
    CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
    CHECK(nbdqueue_length(rig.q) == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 0);
    tear_down(&rig);
}

static void writes_end_once_with_the_right_data(void)
{
    struct rig rig;

    set_up_with(&rig, connected(), 4, 16384);
    fill(image, DISK_SIZE);
    for (uintptr_t i = 0; i < 8; i++)
        submit(&rig, NBDQUEUE_WRITE, i + 1, DISK_SIZE / 8, i * DISK_SIZE / 8);
    finish(&rig, 8);
    CHECK(each_ended_once(&rig, 8));
    load(rig.s, other_image);
    CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
    tear_down(&rig);
}

static void a_queue_of_depth_one_sends_one_command_at_a_time(void)
{
    struct rig rig;
    struct command first, second;

    set_up(&rig, 1, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 2 * SIZE, 0);
    first = receive_command(rig.server);
    CHECK(recv(rig.server, image, 1, MSG_DONTWAIT) == -1);
    answer(rig.server, first, 0, other_image, SIZE);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, 0) == 0);
    second = receive_command(rig.server);
    CHECK(first.offset == 0 && second.offset == SIZE);
    answer(rig.server, second, 0, other_image, SIZE);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

static void a_copy_has_the_same_data(void)
{
    struct rig rig;
    struct nbdshim *source = connected();

    set_up_with(&rig, connected(), 4, 16384);
    add(rig.q, NBDQUEUE_SOURCE, source);
    fill(other_image, DISK_SIZE);
    store(source, other_image);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_COPY, 1, NULL, DISK_SIZE, 0, 0) == 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    load(rig.s, image);
    CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
    CHECK(nbdqueue_copied(rig.q) == DISK_SIZE);
    tear_down(&rig);
    nbdshim_destroy(source);
}

/* Handles of the target and the source, added alternately: only the target receives writes. */
static void handles_may_be_added_in_any_order(void)
{
    struct rig rig;
    struct nbdshim *source = connected(), *second = nbdshim_create();
    int server = connect_to_silence(second, DISK_SIZE);

    set_up(&rig, 2, SIZE);
    add(rig.q, NBDQUEUE_SOURCE, source);
    add(rig.q, NBDQUEUE_TARGET, second);
    submit(&rig, NBDQUEUE_WRITE, 1, 2 * SIZE, 0);
    CHECK(receive_command(rig.server).offset == 0);
    CHECK(receive_command(server).offset == SIZE);
    nbdshim_destroy(second);
    tear_down(&rig);
    nbdshim_destroy(source);
    close(server);
}

static void an_error_comes_with_its_offset(void)
{
    struct rig rig;
    struct command commands[4];

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 4 * SIZE, SIZE);
    for (int i = 0; i < 4; i++)
        commands[i] = receive_command(rig.server);
    for (int i = 0; i < 4; i++)
        answer(rig.server, commands[i], i == 2 ? EIO : 0, other_image, i == 2 ? 0 : SIZE);
    finish(&rig, 1);
    CHECK(rig.done[0].error == EIO);
    CHECK(rig.done[0].offset == 3 * SIZE);
    CHECK(rig.done[0].side == NBDQUEUE_TARGET);
    tear_down(&rig);
}

static void after_an_error_the_rest_of_a_request_is_not_sent(void)
{
    struct rig rig;

    set_up(&rig, 1, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 4 * SIZE, 0);
    answer(rig.server, receive_command(rig.server), EIO, NULL, 0);
    finish(&rig, 1);
    CHECK(rig.done[0].error == EIO);
    CHECK(recv(rig.server, image, 1, MSG_DONTWAIT) == -1);
    tear_down(&rig);
}

static void a_request_past_the_end_fails_and_is_not_sent(void)
{
    struct rig rig;

    set_up(&rig, 4, SIZE);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_READ, 1, image, SIZE, DISK_SIZE - 1, 0) == 0);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_WRITE, 2, image, SIZE, UINT64_MAX - 1, 0) == 0);
    finish(&rig, 2);
    CHECK(rig.done[0].token == 1 && rig.done[0].error == EINVAL);
    CHECK(rig.done[1].token == 2 && rig.done[1].error == ENOSPC);
    CHECK(recv(rig.server, image, 1, MSG_DONTWAIT) == -1);
    tear_down(&rig);
}

static void what_is_dropped_keeps_its_memory_until_the_handle_is_closed(void)
{
    struct rig rig;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 6 * SIZE,
           0); /* four pieces are in flight, the others are queued */
    submit(&rig, NBDQUEUE_WRITE, 2, SIZE, 0);
    nbdqueue_drop(rig.q);
    CHECK(nbdshim_orphans(rig.s) == 4);
    CHECK(atomic_load(&rig.s->orphan_bytes) == 4 * SIZE);
    CHECK(rig.token.releases == 0);
    CHECK(nbdshim_close(rig.s) == 0);
    CHECK(nbdshim_orphans(rig.s) == 0);
    CHECK(rig.token.releases == 1);
    tear_down(&rig);
}

static void what_is_dropped_keeps_its_memory_until_the_last_answer(void)
{
    struct rig rig;
    struct command first, second;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 2 * SIZE, 0);
    nbdqueue_drop(rig.q);
    first = receive_command(rig.server);
    second = receive_command(rig.server);
    answer(rig.server, second, 0, other_image, SIZE);
    CHECK(nbdcall_poll(rig.s, -1) == 1);
    CHECK(nbdshim_orphans(rig.s) == 1);
    CHECK(rig.token.releases == 0);
    answer(rig.server, first, 0, other_image, SIZE);
    CHECK(nbdcall_poll(rig.s, -1) == 1);
    CHECK(nbdshim_orphans(rig.s) == 0);
    CHECK(rig.token.releases == 1);
    tear_down(&rig);
}

static void what_was_answered_before_the_drop_is_no_orphan(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    CHECK(nbdcall_poll(rig.s, -1) == 1);
    nbdqueue_drop(rig.q);
    CHECK(nbdshim_orphans(rig.s) == 0);
    CHECK(nbdcall_aio_in_flight(rig.s) == 0);
    CHECK(rig.token.releases == 1);
    tear_down(&rig);
}

static void commands_without_data_are_orphans_without_bytes(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_TRIM, 1, DISK_SIZE, 0);
    submit(&rig, NBDQUEUE_FLUSH, 2, 0, 0);
    nbdqueue_drop(rig.q);
    CHECK(nbdshim_orphans(rig.s) == 2);
    CHECK(atomic_load(&rig.s->orphan_bytes) == 0);
    tear_down(&rig);
}

static void a_queue_that_was_dropped_refuses_everything(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    nbdqueue_drop(rig.q);
    nbdqueue_drop(rig.q);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_READ, 2, image, SIZE, 0, 0) == NBDSHIM_CLOSED);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == NBDSHIM_CLOSED);
    CHECK(nbdqueue_length(rig.q) == 0);
    tear_down(&rig);
}

static void a_wait_after_the_drop_ignores_what_is_answered_then(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    nbdqueue_drop(rig.q);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    CHECK(nbdcall_poll(rig.s, -1) == 1);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == NBDSHIM_CLOSED);
    tear_down(&rig);
}

static void a_queue_may_be_destroyed_before_its_handle(void)
{
    struct rig rig;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 6 * SIZE, 0);
    nbdqueue_destroy(rig.q);
    rig.q = NULL;
    CHECK(nbdshim_orphans(rig.s) == 4);
    CHECK(rig.token.releases == 0);
    tear_down(&rig);
}

static void a_handle_may_be_destroyed_before_its_queue(void)
{
    struct rig rig;

    set_up(&rig, 4, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 6 * SIZE, 0);
    nbdshim_destroy(rig.s);
    rig.s = NULL;
    CHECK(rig.token.releases == 0);
    finish(&rig, 1);
    CHECK(rig.done[0].error == ENOTCONN);
    tear_down(&rig);
}

static void *wait_for_all(void *argument)
{
    struct rig *rig = argument;
    static struct nbdqueue_done done[MAX_DONE];
    int count = nbdqueue_wait(rig->q, done, MAX_DONE, MAX_DONE, NO_TIMEOUT);

    if (count > 0)
        memcpy(rig->done, done, sizeof done);
    return (void *)(intptr_t)count;
}

/* Let another thread wait for all requests; returns when it sleeps or is about to. */
static pthread_t start_waiting(struct rig *rig)
{
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, wait_for_all, rig) == 0);
    while (atomic_load(&rig->s->users) != 2)
        sched_yield();
    return thread;
}

static int join(pthread_t thread)
{
    void *result = NULL;

    CHECK(pthread_join(thread, &result) == 0);
    return (int)(intptr_t)result;
}

static void a_wait_ends_when_another_thread_closes_the_handle(void)
{
    struct rig rig;
    pthread_t thread;

    set_up(&rig, 2, SIZE);
    for (uintptr_t i = 1; i <= 4; i++)
        submit(&rig, NBDQUEUE_READ, i, SIZE, SIZE * i);
    thread = start_waiting(&rig);
    CHECK(nbdshim_close(rig.s) == 0);
    CHECK(join(thread) == 4);
    for (int i = 0; i < 4; i++)
        CHECK(rig.done[i].error == ENOTCONN);
    tear_down(&rig);
}

static void a_wait_ends_when_another_thread_drops_the_queue(void)
{
    struct rig rig;
    pthread_t thread;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, 4 * SIZE, 0);
    thread = start_waiting(&rig);
    nbdqueue_drop(rig.q);
    CHECK(join(thread) == NBDSHIM_CLOSED);
    CHECK(nbdshim_orphans(rig.s) == 2);
    CHECK(rig.token.releases == 0);
    tear_down(&rig);
}

static void the_other_of_two_handles_continues_when_one_is_closed(void)
{
    struct rig rig;
    struct nbdshim *other = connected();
    int failed = 0;

    set_up(&rig, 8, SIZE);
    add(rig.q, NBDQUEUE_TARGET, other);
    for (uintptr_t i = 0; i < 8; i++)
        submit(&rig, NBDQUEUE_READ, i + 1, SIZE, SIZE * i);
    CHECK(nbdshim_close(rig.s) == 0);
    finish(&rig, 8);
    for (int i = 0; i < 8; i++)
        failed += rig.done[i].error == ENOTCONN;
    CHECK(failed == 4);
    submit(&rig, NBDQUEUE_READ, 1, 8 * SIZE, 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
    nbdshim_destroy(other);
}

static void all_requests_to_a_server_that_dies_end_with_the_connections_error(void)
{
    struct nbdshim *s = nbdshim_create();
    pid_t server = connect_to_child(s);
    struct rig rig;

    set_up_with(&rig, s, 4, SIZE);
    CHECK(kill(server, SIGSTOP) == 0);
    CHECK(waitpid(server, NULL, WUNTRACED) == server);
    for (uintptr_t i = 0; i < 12; i++)
        submit(&rig, i % 2 ? NBDQUEUE_READ : NBDQUEUE_WRITE, i, SIZE, SIZE * i);
    kill_server(server);
    finish(&rig, 12);
    for (int i = 0; i < 12; i++) {
        CHECK(rig.done[i].error == rig.done[0].error);
        CHECK(rig.done[i].error != 0 && rig.done[i].error != EINVAL);
    }
    tear_down(&rig);
}

static void a_servers_error_is_not_replaced_by_the_connections(void)
{
    struct rig rig;
    struct command commands[3];

    set_up(&rig, 3, SIZE);
    for (uintptr_t i = 0; i < 4; i++)
        submit(&rig, NBDQUEUE_READ, i, SIZE, SIZE * i);
    for (int i = 0; i < 3; i++)
        commands[i] = receive_command(rig.server);
    answer(rig.server, commands[0], EPERM, NULL, 0);
    CHECK(nbdcall_poll(rig.s, -1) == 1);
    CHECK(shutdown(rig.server, SHUT_RDWR) == 0);
    (void)nbdcall_poll(rig.s, -1);
    finish(&rig, 4);
    for (int i = 0; i < 4; i++)
        CHECK((rig.done[i].error == EPERM) == (rig.done[i].token == 0));
    tear_down(&rig);
}

static void interrupt(int number)
{
    (void)number;
    answer_interrupts(-1);
}

static void a_signal_handler_that_raises_ends_the_wait_and_nothing_else(void)
{
    const struct sigaction action = {.sa_handler = interrupt};
    const struct itimerval soon = {.it_value = {.tv_usec = 20000}};
    struct sigaction before;
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    CHECK(sigaction(SIGALRM, &action, &before) == 0);
    CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == NBDSHIM_STOPPED);
    answer_interrupts(0);
    CHECK(sigaction(SIGALRM, &before, NULL) == 0);
    CHECK(nbdshim_orphans(rig.s) == 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

static void a_wait_ends_at_its_deadline_and_nothing_is_lost(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, 0) == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, 0.01) == 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

static void a_wait_ends_at_its_deadline_even_if_replies_keep_coming(void)
{
    char *argv[] = {"nbdkit", "-s", "--exit-with-parent", "null", "4E", NULL};
    struct nbdshim *s = nbdshim_create();
    struct rig rig;

    CHECK(nbdcall_connect_command(s, argv) == 0);
    set_up_with(&rig, s, 64, SIZE);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_ZERO, 1, NULL, UINT64_C(1) << 62, 0, 0) == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, 0.02) == 0);
    CHECK(nbdqueue_zeroed(rig.q) > 0);
    nbdqueue_drop(rig.q);
    while (nbdshim_orphans(s) != 0)
        REQUIRE(nbdcall_poll(s, -1) == 1);
    tear_down(&rig);
}

static void requests_are_reported_again_until_they_are_taken(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    for (int i = 0; i < 2; i++) {
        CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 1);
        CHECK(each_ended_once(&rig, 1));
    }
    nbdqueue_take(rig.q, rig.done, 1);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 0);
    tear_down(&rig);
}

static void a_wake_before_a_wait_ends_it(void)
{
    struct rig rig;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    nbdqueue_wake(rig.q);
    nbdqueue_wake(rig.q);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

static void a_wake_ends_the_wait_of_another_thread(void)
{
    struct rig rig;
    pthread_t thread;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    thread = start_waiting(&rig);
    nbdqueue_wake(rig.q);
    nbdqueue_wake(rig.q);
    CHECK(join(thread) == 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    while (nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 0)
        ; /* the second nbdqueue_wake may end this wait */
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

static void what_is_submitted_while_another_thread_waits_is_sent(void)
{
    struct rig rig;
    pthread_t thread;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    thread = start_waiting(&rig);
    submit(&rig, NBDQUEUE_READ, 2, SIZE, SIZE);
    for (int i = 0; i < 2; i++)
        answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    CHECK(join(thread) == 2);
    CHECK(each_ended_once(&rig, 2));
    tear_down(&rig);
}

/* A queue that several threads share; other_image has the bytes of its disk. */
struct shared {
    struct rig rig;
    pthread_mutex_t lock; /* as in nbd/_disks/queue.py: one thread at a time waits and takes */
    atomic_uint reported;
    atomic_bool is_over;
};

#define ROUNDS 300
#define SECTOR 512

static char memory[3][ROUNDS][SECTOR];

static uint64_t place(uintptr_t round)
{
    return (round * 7919 % (DISK_SIZE / SECTOR)) * SECTOR;
}

static void set_up_shared(struct shared *shared)
{
    *shared = (struct shared){.lock = PTHREAD_MUTEX_INITIALIZER};
    set_up_with(&shared->rig, connected(), 8, 65536);
    fill(other_image, DISK_SIZE);
    store(shared->rig.s, other_image);
    memset(memory, 0, sizeof memory);
}

static void submit_rounds(struct shared *shared, char (*buffers)[SECTOR])
{
    for (uintptr_t i = 0; i < ROUNDS; i++)
        CHECK(nbdqueue_submit(shared->rig.q, NBDQUEUE_READ, i, buffers[i], SECTOR, place(i), 0) ==
              0);
}

static bool rounds_are_right(char (*buffers)[SECTOR])
{
    for (uintptr_t i = 0; i < ROUNDS; i++) {
        if (memcmp(buffers[i], other_image + place(i), SECTOR) != 0)
            return false;
    }
    return true;
}

static void *submit_first(void *argument)
{
    submit_rounds(argument, memory[0]);
    return NULL;
}

static void *submit_second(void *argument)
{
    submit_rounds(argument, memory[1]);
    return NULL;
}

/* Wait and take until all requests were reported. */
static void *wait_and_take(void *argument)
{
    struct shared *shared = argument;
    struct nbdqueue_done done[MAX_DONE];

    while (shared->reported < 2 * ROUNDS) {
        int count;

        pthread_mutex_lock(&shared->lock);
        count = nbdqueue_wait(shared->rig.q, done, MAX_DONE, 1, NO_TIMEOUT);
        CHECK(count >= 0);
        for (int i = 0; i < count; i++)
            CHECK(done[i].error == 0);
        nbdqueue_take(shared->rig.q, done, count);
        shared->reported += (unsigned)count;
        pthread_mutex_unlock(&shared->lock);
        sched_yield();
    }
    return NULL;
}

static void *read_synchronously(void *argument)
{
    struct shared *shared = argument;

    for (uintptr_t i = 0; i < ROUNDS; i++)
        CHECK(nbdcall_pread(shared->rig.s, memory[2][i], SECTOR, place(i), 0) == 0);
    return NULL;
}

static void run_together(struct shared *shared, void *(*const *functions)(void *), size_t count)
{
    pthread_t threads[MAX_DONE];

    for (size_t i = 0; i < count; i++)
        CHECK(pthread_create(&threads[i], NULL, functions[i], shared) == 0);
    for (size_t i = 0; i < count; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(shared->reported == 2 * ROUNDS);
    CHECK(rounds_are_right(memory[0]) && rounds_are_right(memory[1]));
}

static void threads_that_submit_and_wait_share_a_queue(void)
{
    void *(*const functions[])(void *) = {submit_first, submit_second, wait_and_take,
                                          wait_and_take};
    struct shared shared;

    set_up_shared(&shared);
    run_together(&shared, functions, 4);
    tear_down(&shared.rig);
}

static void calls_that_wait_and_a_queue_share_a_handle(void)
{
    void *(*const functions[])(void *) = {submit_first, submit_second, wait_and_take,
                                          read_synchronously};
    struct shared shared;

    set_up_shared(&shared);
    run_together(&shared, functions, 4);
    CHECK(rounds_are_right(memory[2]));
    tear_down(&shared.rig);
}

static void *close_the_handle(void *argument)
{
    struct shared *shared = argument;

    while (shared->reported == 0)
        sched_yield();
    CHECK(nbdshim_close(shared->rig.s) == 0);
    return NULL;
}

static void *wait_for_errors_too(void *argument)
{
    struct shared *shared = argument;
    struct nbdqueue_done done[MAX_DONE];

    while (shared->reported < 2 * ROUNDS) {
        int count = nbdqueue_wait(shared->rig.q, done, MAX_DONE, 1, NO_TIMEOUT);

        CHECK(count >= 0);
        for (int i = 0; i < count; i++)
            CHECK(done[i].error != EINVAL);
        nbdqueue_take(shared->rig.q, done, count);
        shared->reported += (unsigned)count;
    }
    return NULL;
}

static void closing_in_the_middle_of_it_all_ends_every_request(void)
{
    void *(*const functions[])(void *) = {submit_first, submit_second, wait_for_errors_too,
                                          close_the_handle};
    pthread_t threads[4];
    struct shared shared;

    set_up_shared(&shared);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, functions[i], &shared) == 0);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(shared.reported == 2 * ROUNDS);
    tear_down(&shared.rig);
}

static void *move_until_it_is_over(void *argument)
{
    struct shared *shared = argument;

    while (!shared->is_over) {
        (void)nbdcall_poll(shared->rig.s, 1);
        sched_yield();
    }
    return NULL;
}

static void *submit_heap_buffers(void *argument)
{
    struct shared *shared = argument;
    char(*buffers)[SECTOR] = shared->rig.token.data;

    for (uintptr_t i = 0; i < ROUNDS; i++) {
        if (nbdqueue_submit(shared->rig.q, NBDQUEUE_READ, i, buffers[i], SECTOR, place(i), 0) != 0)
            return NULL;
        shared->reported++;
    }
    return NULL;
}

static void free_data(struct token *t)
{
    free(t->data);
    t->data = NULL;
}

/* When `release` gets the queue's token, the buffers may be freed: nothing writes to them. */
static void a_drop_in_the_middle_of_it_all_releases_no_buffer_in_use(void)
{
    void *(*const functions[])(void *) = {submit_heap_buffers, move_until_it_is_over};

    for (unsigned round = 0; round < 50; round++) {
        struct shared shared;
        pthread_t threads[2];

        set_up_shared(&shared);
        shared.rig.token.data = malloc(sizeof memory[0]);
        shared.rig.token.released = free_data;
        for (size_t i = 0; i < 2; i++)
            CHECK(pthread_create(&threads[i], NULL, functions[i], &shared) == 0);
        while (shared.reported < round % 16)
            (void)nbdqueue_wait(shared.rig.q, shared.rig.done, MAX_DONE, 1, 0);
        nbdqueue_drop(shared.rig.q);
        CHECK(pthread_join(threads[0], NULL) == 0);
        shared.is_over = true;
        CHECK(pthread_join(threads[1], NULL) == 0);
        tear_down(&shared.rig);
    }
}

/* The results of a callback of the queue's handle that uses the queue. */
struct inside {
    struct nbdqueue *q;
    int submitted, waited;
};

static void use_queue(struct token *t)
{
    struct inside *inside = t->data;
    struct nbdqueue_done done;

    inside->submitted = nbdqueue_submit(inside->q, NBDQUEUE_READ, 9, image, SIZE, 0, 0);
    inside->waited = nbdqueue_wait(inside->q, &done, 1, 1, 0);
}

static void drop_queue(struct token *t)
{
    struct inside *inside = t->data;

    nbdqueue_drop(inside->q);
}

static void a_callback_of_the_handle_must_not_submit_or_wait(void)
{
    struct rig rig;
    struct inside inside = {0};
    struct token token = {.inside = use_queue, .data = &inside};

    set_up(&rig, 2, SIZE);
    inside.q = rig.q;
    CHECK(start_read(rig.s, image, SIZE, 0, give(&token), true) > 0);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    for (int i = 0; i < 2; i++)
        answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    finish(&rig, 1);
    CHECK(token.calls == 1);
    CHECK(inside.submitted == NBDSHIM_REENTERED);
    CHECK(inside.waited == NBDSHIM_REENTERED);
    CHECK(nbdqueue_length(rig.q) == 0);
    tear_down(&rig);
}

static void a_callback_may_drop_the_queue_on_which_its_thread_waits(void)
{
    struct rig rig;
    struct inside inside = {0};
    struct token token = {.inside = drop_queue, .data = &inside};

    set_up(&rig, 2, SIZE);
    inside.q = rig.q;
    CHECK(start_read(rig.s, image, SIZE, 0, give(&token), true) > 0);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == NBDSHIM_CLOSED);
    CHECK(nbdshim_orphans(rig.s) == 1);
    CHECK(rig.token.releases == 0);
    tear_down(&rig);
}

static void a_queue_dropped_in_a_callback_keeps_its_memory_until_it_has_forgotten_all(void)
{
    struct rig rig;
    struct inside inside = {0};
    struct token token = {.answer = 1, .inside = drop_queue, .data = &inside};

    set_up(&rig, 2, SIZE);
    inside.q = rig.q;
    CHECK(start_read(rig.s, image, SIZE, 0, give(&token), true) > 0);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    for (int i = 0; i < 2; i++)
        answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    drain(rig.s);
    CHECK(token.calls == 1);
    CHECK(rig.token.releases == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == NBDSHIM_CLOSED);
    CHECK(rig.token.releases == 1);
    tear_down(&rig);
}

static void destroy_queue(struct token *t)
{
    struct inside *inside = t->data;

    nbdqueue_destroy(inside->q);
}

static void a_callback_may_destroy_a_queue_on_which_nobody_waits(void)
{
    struct rig rig;
    struct inside inside = {0};
    struct token token = {.answer = 1, .inside = destroy_queue, .data = &inside};

    set_up(&rig, 2, SIZE);
    inside.q = rig.q;
    rig.q = NULL;
    CHECK(nbdqueue_submit(inside.q, NBDQUEUE_READ, 1, image, SIZE, 0, 0) == 0);
    CHECK(start_read(rig.s, other_image, SIZE, 0, give(&token), true) > 0);
    for (int i = 0; i < 2; i++)
        answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    while (token.calls == 0)
        REQUIRE(nbdcall_poll(rig.s, -1) == 1);
    CHECK(nbdshim_orphans(rig.s) == 0);
    tear_down(&rig);
}

static void a_release_may_drop_the_queue_on_which_its_thread_waits(void)
{
    struct rig rig;
    struct inside inside = {0};
    struct token chunk = {.released = drop_queue, .data = &inside}, completion = {.answer = 1};
    int state = NBDSHIM_CLEAN;

    set_up(&rig, 2, SIZE);
    inside.q = rig.q;
    CHECK(nbdcall_aio_pread_structured(rig.s, other_image, SIZE, &state, 0, give(&chunk),
                                       give(&completion), true, 0) > 0);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    for (int i = 0; i < 2; i++)
        answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, NO_TIMEOUT) == 1);
    CHECK(chunk.releases == 1);
    CHECK(rig.token.releases == 1);
    tear_down(&rig);
}

/* A file of `size` bytes, zeroes or the given ones. */
static int new_file(size_t size, const char *bytes)
{
    int fd = memfd_create("queue", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK(ftruncate(fd, (off_t)size) == 0);
    if (bytes != NULL)
        CHECK(pwrite(fd, bytes, size, 0) == (ssize_t)size);
    return fd;
}

static void set_up_files(struct rig *rig, int target, int source)
{
    *rig = (struct rig){.server = -1};
    rig->q = nbdqueue_create(4, SIZE, give(&rig->token));
    nbdqueue_add_file(rig->q, NBDQUEUE_TARGET, target, 0, DISK_SIZE);
    nbdqueue_add_file(rig->q, NBDQUEUE_SOURCE, source, 0, DISK_SIZE);
}

static void a_queue_over_files_needs_no_handle(void)
{
    struct rig rig;
    int target = new_file(DISK_SIZE, NULL), source;

    fill(other_image, DISK_SIZE);
    source = new_file(DISK_SIZE, other_image);
    set_up_files(&rig, target, source);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_COPY, 1, NULL, DISK_SIZE, 0, 0) == 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_ZERO, 1, NULL, 3 * SIZE, SIZE + 1, 0) == 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    memset(other_image + SIZE + 1, 0, 3 * SIZE);
    CHECK(pread(target, image, DISK_SIZE, 0) == DISK_SIZE);
    CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
    CHECK(nbdqueue_copied(rig.q) == DISK_SIZE && nbdqueue_zeroed(rig.q) == 3 * SIZE);
    tear_down(&rig);
    close(target);
    close(source);
}

static void a_source_file_that_is_too_short_fails_with_eio(void)
{
    struct rig rig;
    int target = new_file(DISK_SIZE, NULL), source = new_file(3 * SIZE, NULL);

    set_up_files(&rig, target, source);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_COPY, 1, NULL, DISK_SIZE, 0, 0) == 0);
    finish(&rig, 1);
    CHECK(rig.done[0].error == EIO);
    CHECK(rig.done[0].side == NBDQUEUE_SOURCE);
    CHECK(rig.done[0].offset == 3 * SIZE);
    tear_down(&rig);
    close(target);
    close(source);
}

static void set_up_blocks(struct rig *rig)
{
    set_up_with(rig, connected_to_blocks(), 8, 2 * BLOCK);
    CHECK(nbdqueue_minimum(rig->q, NBDQUEUE_TARGET) == BLOCK);
    fill(other_image, DISK_SIZE);
    store(rig->s, other_image);
}

/* Whether the disk's bytes equal other_image. */
static bool has_right_bytes(struct rig *rig)
{
    load(rig->s, image);
    return memcmp(image, other_image, DISK_SIZE) == 0;
}

static void reads_need_not_be_aligned(void)
{
    struct rig rig;

    set_up_blocks(&rig);
    submit(&rig, NBDQUEUE_READ, 1, 5 * BLOCK, 100);
    submit(&rig, NBDQUEUE_READ, 2, 10, DISK_SIZE - 10);
    finish(&rig, 2);
    CHECK(each_ended_once(&rig, 2));
    CHECK(memcmp(image + 100, other_image + 100, 5 * BLOCK) == 0);
    CHECK(memcmp(image + DISK_SIZE - 10, other_image + DISK_SIZE - 10, 10) == 0);
    tear_down(&rig);
}

static void writes_need_not_be_aligned_and_may_share_a_block(void)
{
    struct rig rig;

    set_up_blocks(&rig);
    memset(image, 'x', sizeof image);
    submit(&rig, NBDQUEUE_WRITE, 1, 2 * BLOCK, 100);
    submit(&rig, NBDQUEUE_WRITE, 2, 100, 2 * BLOCK + 200);
    submit(&rig, NBDQUEUE_WRITE, 3, BLOCK, 2 * BLOCK + 300);
    finish(&rig, 3);
    CHECK(each_ended_once(&rig, 3));
    memset(other_image + 100, 'x', 2 * BLOCK);
    memset(other_image + 2 * BLOCK + 200, 'x', 100);
    memset(other_image + 2 * BLOCK + 300, 'x', BLOCK);
    CHECK(has_right_bytes(&rig));
    tear_down(&rig);
}

static void zeroes_need_not_be_aligned(void)
{
    const struct {
        uint64_t start, stop;
    } ranges[] = {{100, 200}, {BLOCK + 1, 3 * BLOCK - 1}, {8 * BLOCK, 9 * BLOCK + 1}};
    struct rig rig;

    set_up_blocks(&rig);
    for (uintptr_t i = 0; i < 3; i++) {
        submit(&rig, NBDQUEUE_ZERO, i + 1, ranges[i].stop - ranges[i].start, ranges[i].start);
        memset(other_image + ranges[i].start, 0, ranges[i].stop - ranges[i].start);
    }
    finish(&rig, 3);
    CHECK(each_ended_once(&rig, 3));
    CHECK(has_right_bytes(&rig));
    tear_down(&rig);
}

static void zeroes_up_to_the_end_need_not_be_aligned(void)
{
    struct rig rig;

    set_up_blocks(&rig);
    submit(&rig, NBDQUEUE_ZERO, 1, DISK_SIZE - 100, 100);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    memset(other_image + 100, 0, DISK_SIZE - 100);
    CHECK(has_right_bytes(&rig));
    tear_down(&rig);
}

static void a_trim_leaves_the_blocks_at_its_edges(void)
{
    struct rig rig;

    set_up_blocks(&rig);
    submit(&rig, NBDQUEUE_TRIM, 1, 2 * BLOCK, 100);
    submit(&rig, NBDQUEUE_TRIM, 2, 100, 4 * BLOCK + 100);
    finish(&rig, 2);
    CHECK(each_ended_once(&rig, 2));
    memset(other_image + BLOCK, 0, BLOCK);
    CHECK(has_right_bytes(&rig));
    tear_down(&rig);
}

static void the_child_of_a_fork_does_not_wait_for_the_parents_threads(void)
{
    struct rig rig;
    pthread_t thread;
    pid_t child;
    int status = -1;

    set_up(&rig, 2, SIZE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    thread = start_waiting(&rig);
    child = fork();
    if (child == 0) {
        alarm(10);
        nbdqueue_drop(rig.q);
        nbdqueue_destroy(rig.q);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    answer(rig.server, receive_command(rig.server), 0, other_image, SIZE);
    CHECK(join(thread) == 1);
    CHECK(each_ended_once(&rig, 1));
    tear_down(&rig);
}

RUN_TESTS(TEST(reads_end_once_with_the_right_data), TEST(writes_end_once_with_the_right_data),
          TEST(a_queue_of_depth_one_sends_one_command_at_a_time), TEST(a_copy_has_the_same_data),
          TEST(handles_may_be_added_in_any_order), TEST(an_error_comes_with_its_offset),
          TEST(after_an_error_the_rest_of_a_request_is_not_sent),
          TEST(a_request_past_the_end_fails_and_is_not_sent),
          TEST(what_is_dropped_keeps_its_memory_until_the_handle_is_closed),
          TEST(what_is_dropped_keeps_its_memory_until_the_last_answer),
          TEST(what_was_answered_before_the_drop_is_no_orphan),
          TEST(commands_without_data_are_orphans_without_bytes),
          TEST(a_queue_that_was_dropped_refuses_everything),
          TEST(a_wait_after_the_drop_ignores_what_is_answered_then),
          TEST(a_queue_may_be_destroyed_before_its_handle),
          TEST(a_handle_may_be_destroyed_before_its_queue),
          TEST(a_wait_ends_when_another_thread_closes_the_handle),
          TEST(a_wait_ends_when_another_thread_drops_the_queue),
          TEST(the_other_of_two_handles_continues_when_one_is_closed),
          TEST(all_requests_to_a_server_that_dies_end_with_the_connections_error),
          TEST(a_servers_error_is_not_replaced_by_the_connections),
          TEST(a_signal_handler_that_raises_ends_the_wait_and_nothing_else),
          TEST(a_wait_ends_at_its_deadline_and_nothing_is_lost),
          TEST(a_wait_ends_at_its_deadline_even_if_replies_keep_coming),
          TEST(requests_are_reported_again_until_they_are_taken),
          TEST(a_wake_before_a_wait_ends_it), TEST(a_wake_ends_the_wait_of_another_thread),
          TEST(what_is_submitted_while_another_thread_waits_is_sent),
          TEST(threads_that_submit_and_wait_share_a_queue),
          TEST(calls_that_wait_and_a_queue_share_a_handle),
          TEST(closing_in_the_middle_of_it_all_ends_every_request),
          TEST(a_drop_in_the_middle_of_it_all_releases_no_buffer_in_use),
          TEST(a_callback_of_the_handle_must_not_submit_or_wait),
          TEST(a_callback_may_drop_the_queue_on_which_its_thread_waits),
          TEST(a_queue_dropped_in_a_callback_keeps_its_memory_until_it_has_forgotten_all),
          TEST(a_callback_may_destroy_a_queue_on_which_nobody_waits),
          TEST(a_release_may_drop_the_queue_on_which_its_thread_waits),
          TEST(a_queue_over_files_needs_no_handle),
          TEST(a_source_file_that_is_too_short_fails_with_eio), TEST(reads_need_not_be_aligned),
          TEST(writes_need_not_be_aligned_and_may_share_a_block), TEST(zeroes_need_not_be_aligned),
          TEST(zeroes_up_to_the_end_need_not_be_aligned),
          TEST(a_trim_leaves_the_blocks_at_its_edges),
          TEST(the_child_of_a_fork_does_not_wait_for_the_parents_threads))
