// SPDX-License-Identifier: LGPL-2.0-or-later
/* How a queue replaces lost connections, and makes again what the server may have lost. */
#include "check.h"
#include "rig.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* Of the NBD protocol: HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM and SEND_WRITE_ZEROES. */
#define FLAGS (1 | 4 | 8 | 32 | 64)
enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_ZERO };

#define LARGE (UINT64_C(64) << 20)

/* Connect a new handle to a silent server, which can flush, trim and zero. */
static struct nbdshim *new_handle(int *server)
{
    struct nbdshim *s = nbdshim_create();

    *server = connect_with_flags(s, DISK_SIZE, FLAGS);
    CHECK(nbdcall_set_strict_mode(s, 0) == 0);
    return s;
}

/* Set up a rig whose target is replaced when it is lost. */
static void set_up_replaceable(struct rig *rig, uint64_t bound)
{
    *rig = (struct rig){.server = -1};
    rig->s = new_handle(&rig->server);
    rig->q = nbdqueue_create(4, 65536, give(&rig->token));
    CHECK(nbdqueue_set_reconnect(rig->q, NBDQUEUE_TARGET, bound) == 0);
    add(rig->q, NBDQUEUE_TARGET, rig->s);
}

/* Let the queue move without waiting for a request. */
static void move(struct rig *rig)
{
    CHECK(nbdqueue_wait(rig->q, rig->done, MAX_DONE, MAX_DONE, 0.001) >= 0);
}

/* End the server's connection, and have the queue notice that: a request has to be in flight. */
static void lose(struct rig *rig)
{
    unsigned losses = nbdqueue_losses(rig->q);

    if (nbdqueue_length(rig->q) == 0)
        submit(rig, NBDQUEUE_READ, 9, SIZE, DISK_SIZE - SIZE);
    close(rig->server);
    while (nbdqueue_losses(rig->q) == losses)
        move(rig);
    CHECK(nbdqueue_error(rig->q, rig->s) != 0);
}

/* Give the queue a new connection for the lost one. */
static void replace(struct rig *rig)
{
    struct nbdshim *lost = rig->s;

    rig->s = new_handle(&rig->server);
    add(rig->q, NBDQUEUE_TARGET, rig->s);
    nbdshim_destroy(lost);
    move(rig);
}

/* Receive a command, and the data of a write. */
static struct command receive(const struct rig *rig, char *data)
{
    struct command command = receive_command(rig->server);

    if (command.type == CMD_WRITE)
        CHECK(recv(rig->server, data, command.size, MSG_WAITALL) == (ssize_t)command.size);
    return command;
}

static bool is_command(struct command command, uint16_t type, uint64_t offset)
{
    return command.type == type && command.offset == offset;
}

/* Write SIZE bytes, which the server acknowledges. */
static void write_one(struct rig *rig, uint64_t offset, char byte)
{
    char data[SIZE];

    memset(image + offset, byte, SIZE);
    submit(rig, NBDQUEUE_WRITE, 1, SIZE, offset);
    move(rig);
    answer(rig->server, receive(rig, data), 0, NULL, 0);
    finish(rig, 1);
    memset(image + offset, 'x', SIZE); /* the buffer is the caller's again */
}

static void a_lost_command_is_sent_again(void)
{
    struct rig rig;
    char data[SIZE];
    struct command command;

    set_up_replaceable(&rig, LARGE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    move(&rig);
    CHECK(is_command(receive_command(rig.server), CMD_READ, 0));
    lose(&rig);
    CHECK(nbdqueue_length(rig.q) == 1);
    replace(&rig);
    command = receive_command(rig.server);
    CHECK(is_command(command, CMD_READ, 0));
    memset(data, 'd', SIZE);
    answer(rig.server, command, 0, data, SIZE);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    CHECK(memcmp(image, data, SIZE) == 0);
    CHECK(nbdqueue_answers(rig.q, NBDQUEUE_TARGET) == 1);
    tear_down(&rig);
}

static void what_was_not_flushed_is_written_again_before_anything_else(void)
{
    struct rig rig;
    char data[SIZE];
    struct command command;

    set_up_replaceable(&rig, LARGE);
    write_one(&rig, SIZE, 'a');
    submit(&rig, NBDQUEUE_READ, 2, SIZE, 0);
    move(&rig);
    CHECK(is_command(receive_command(rig.server), CMD_READ, 0));
    lose(&rig);
    replace(&rig);
    command = receive(&rig, data);
    CHECK(is_command(command, CMD_WRITE, SIZE));
    CHECK(data[0] == 'a' && data[SIZE - 1] == 'a');
    move(&rig);
    CHECK(recv(rig.server, data, 1, MSG_DONTWAIT) == -1);
    answer(rig.server, command, 0, NULL, 0);
    move(&rig);
    CHECK(is_command(receive_command(rig.server), CMD_READ, 0));
    tear_down(&rig);
}

static void what_was_flushed_is_not_written_again(void)
{
    struct rig rig;
    struct command command;

    set_up_replaceable(&rig, LARGE);
    write_one(&rig, 0, 'a');
    submit(&rig, NBDQUEUE_FLUSH, 1, 0, 0);
    move(&rig);
    command = receive_command(rig.server);
    CHECK(command.type == CMD_FLUSH);
    answer(rig.server, command, 0, NULL, 0);
    finish(&rig, 1);
    lose(&rig);
    replace(&rig);
    CHECK(is_command(receive_command(rig.server), CMD_READ, DISK_SIZE - SIZE));
    tear_down(&rig);
}

static void a_write_with_fua_is_not_written_again(void)
{
    struct rig rig;
    char data[SIZE];

    set_up_replaceable(&rig, LARGE);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_WRITE, 1, image, SIZE, 0, LIBNBD_CMD_FLAG_FUA) == 0);
    move(&rig);
    answer(rig.server, receive(&rig, data), 0, NULL, 0);
    finish(&rig, 1);
    lose(&rig);
    replace(&rig);
    CHECK(is_command(receive_command(rig.server), CMD_READ, DISK_SIZE - SIZE));
    tear_down(&rig);
}

static void changes_that_overlap_are_made_again_in_their_order(void)
{
    struct rig rig;
    char data[SIZE];
    struct command command;

    set_up_replaceable(&rig, LARGE);
    write_one(&rig, 0, 'a');
    write_one(&rig, SIZE / 2, 'b');
    lose(&rig);
    replace(&rig);
    command = receive(&rig, data);
    CHECK(is_command(command, CMD_WRITE, 0) && data[0] == 'a');
    move(&rig);
    CHECK(recv(rig.server, data, 1, MSG_DONTWAIT) == -1);
    answer(rig.server, command, 0, NULL, 0);
    move(&rig);
    command = receive(&rig, data);
    CHECK(is_command(command, CMD_WRITE, SIZE / 2) && data[0] == 'b');
    tear_down(&rig);
}

static void a_replay_that_was_interrupted_flushes_in_between(void)
{
    struct rig rig;
    char data[SIZE];
    struct command command;

    set_up_replaceable(&rig, LARGE);
    write_one(&rig, 0, 'a');
    write_one(&rig, SIZE, 'b');
    lose(&rig);
    replace(&rig);
    CHECK(is_command(receive(&rig, data), CMD_WRITE, 0));
    CHECK(is_command(receive(&rig, data), CMD_WRITE, SIZE));
    lose(&rig);
    replace(&rig);
    command = receive(&rig, data);
    CHECK(is_command(command, CMD_WRITE, 0));
    move(&rig);
    CHECK(recv(rig.server, data, 1, MSG_DONTWAIT) == -1);
    answer(rig.server, command, 0, NULL, 0);
    move(&rig);
    command = receive_command(rig.server);
    CHECK(command.type == CMD_FLUSH);
    answer(rig.server, command, 0, NULL, 0);
    move(&rig);
    CHECK(is_command(receive(&rig, data), CMD_WRITE, SIZE));
    lose(&rig);
    replace(&rig);
    CHECK(is_command(receive(&rig, data), CMD_WRITE, SIZE)); /* the first one is flushed */
    tear_down(&rig);
}

static void a_full_journal_is_flushed_before_the_next_change(void)
{
    struct rig rig;
    char data[SIZE];
    struct command command;

    set_up_replaceable(&rig, SIZE);
    write_one(&rig, 0, 'a');
    submit(&rig, NBDQUEUE_WRITE, 1, SIZE, SIZE);
    move(&rig);
    command = receive_command(rig.server);
    CHECK(command.type == CMD_FLUSH);
    answer(rig.server, command, 0, NULL, 0);
    move(&rig);
    CHECK(is_command(receive(&rig, data), CMD_WRITE, SIZE));
    tear_down(&rig);
}

static void a_flush_of_the_journal_that_fails_fails_the_next_change(void)
{
    struct rig rig;

    set_up_replaceable(&rig, SIZE);
    write_one(&rig, 0, 'a');
    submit(&rig, NBDQUEUE_WRITE, 1, SIZE, SIZE);
    move(&rig);
    answer(rig.server, receive_command(rig.server), EIO, NULL, 0);
    finish(&rig, 1);
    CHECK(rig.done[0].error == EIO && rig.done[0].command == NBDQUEUE_FLUSH);
    tear_down(&rig);
}

static void a_copy_keeps_what_it_has_read(void)
{
    struct rig rig;
    struct nbdshim *source;
    int its_server;
    char data[SIZE];
    struct command command;

    set_up_replaceable(&rig, LARGE);
    source = new_handle(&its_server);
    add(rig.q, NBDQUEUE_SOURCE, source);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_COPY, 1, NULL, SIZE, 0, 0) == 0);
    move(&rig);
    memset(data, 's', SIZE);
    answer(its_server, receive_command(its_server), 0, data, SIZE);
    move(&rig);
    CHECK(is_command(receive(&rig, data), CMD_WRITE, 0));
    lose(&rig);
    memset(data, 0, SIZE);
    replace(&rig);
    command = receive(&rig, data);
    CHECK(is_command(command, CMD_WRITE, 0) && data[0] == 's' && data[SIZE - 1] == 's');
    answer(rig.server, command, 0, NULL, 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    CHECK(nbdqueue_read(rig.q) == SIZE && nbdqueue_written(rig.q) == SIZE);
    CHECK(recv(its_server, data, 1, MSG_DONTWAIT) == -1);
    tear_down(&rig);
    nbdshim_destroy(source);
    close(its_server);
}

static void another_connection_takes_the_commands_of_a_lost_one(void)
{
    struct rig rig;
    struct nbdshim *other;
    int its_server;

    set_up_replaceable(&rig, LARGE);
    other = new_handle(&its_server);
    add(rig.q, NBDQUEUE_TARGET, other);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    submit(&rig, NBDQUEUE_READ, 2, SIZE, SIZE);
    move(&rig);
    CHECK(is_command(receive_command(rig.server), CMD_READ, 0));
    answer(its_server, receive_command(its_server), 0, image, SIZE);
    lose(&rig);
    move(&rig);
    CHECK(is_command(receive_command(its_server), CMD_READ, 0));
    nbdqueue_destroy(rig.q);
    nbdshim_destroy(rig.s);
    nbdshim_destroy(other);
    close(its_server);
}

static void commands_fail_once_a_side_was_given_up(void)
{
    struct rig rig;

    set_up_replaceable(&rig, LARGE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    lose(&rig);
    nbdqueue_give_up(rig.q, NBDQUEUE_TARGET, ETIMEDOUT);
    finish(&rig, 1);
    CHECK(rig.done[0].error == ETIMEDOUT);
    submit(&rig, NBDQUEUE_WRITE, 1, SIZE, 0);
    finish(&rig, 1);
    CHECK(rig.done[0].error == ETIMEDOUT);
    rig.server = -1;
    tear_down(&rig);
}

static void a_cancelled_command_is_not_sent_again(void)
{
    struct rig rig;
    char data[SIZE];

    set_up_replaceable(&rig, LARGE);
    submit(&rig, NBDQUEUE_WRITE, 1, SIZE, 0);
    move(&rig);
    CHECK(is_command(receive(&rig, data), CMD_WRITE, 0));
    nbdqueue_cancel(rig.q, 1);
    lose(&rig);
    replace(&rig);
    finish(&rig, 1);
    CHECK(rig.done[0].error != 0);
    CHECK(recv(rig.server, data, 1, MSG_DONTWAIT) == -1);
    tear_down(&rig);
}

static void another_export_is_refused(void)
{
    struct rig rig;
    struct nbdshim *other = nbdshim_create();
    int its_server = connect_with_flags(other, DISK_SIZE * 2, FLAGS);

    set_up_replaceable(&rig, LARGE);
    submit(&rig, NBDQUEUE_READ, 1, SIZE, 0);
    lose(&rig);
    CHECK(nbdqueue_add(rig.q, NBDQUEUE_TARGET, other) == NBDSHIM_OTHER_EXPORT);
    rig.server = -1;
    tear_down(&rig);
    nbdshim_destroy(other);
    close(its_server);
}

/* A server with a volatile cache: what was not flushed is lost when it is killed. */
static struct {
    pthread_mutex_t lock;
    char stable[DISK_SIZE], cached[DISK_SIZE];
    int life; /* which of its lives it is in */
} disk = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* One of its connections. */
struct connection {
    struct nbdshim *s;
    int socket, life;
    unsigned seed;
    pthread_t thread;
};

/* Execute a command; returns false if the server was killed meanwhile. */
static bool execute(const struct connection *c, struct command command, char *data)
{
    bool is_alive;

    pthread_mutex_lock(&disk.lock);
    is_alive = c->life == disk.life;
    if (is_alive && command.type == CMD_READ)
        memcpy(data, disk.cached + command.offset, command.size);
    else if (is_alive && command.type == CMD_WRITE)
        memcpy(disk.cached + command.offset, data, command.size);
    else if (is_alive && command.type == CMD_ZERO)
        memset(disk.cached + command.offset, 0, command.size);
    else if (is_alive && command.type == CMD_FLUSH)
        memcpy(disk.stable, disk.cached, DISK_SIZE);
    if (is_alive && command.type != CMD_READ && (command.flags & LIBNBD_CMD_FLAG_FUA))
        memcpy(disk.stable + command.offset, disk.cached + command.offset, command.size);
    pthread_mutex_unlock(&disk.lock);
    return is_alive;
}

/* Serve a connection until it ends; replies are in random order. */
static void *serve(void *argument)
{
    struct connection *c = argument;
    struct command commands[4];
    char *data[4];
    int count = 0;

    for (;;) {
        struct pollfd fd = {.fd = c->socket, .events = POLLIN};
        bool has_more = poll(&fd, 1, count > 0 ? 0 : -1) > 0;

        if (has_more && count < 4) {
            char header[28];

            if (recv(c->socket, header, sizeof header, MSG_PEEK | MSG_WAITALL) != sizeof header)
                break;
            commands[count] = receive_command(c->socket);
            data[count] = malloc(commands[count].size + 1);
            if (commands[count].type == CMD_DISC ||
                (commands[count].type == CMD_WRITE &&
                 recv(c->socket, data[count], commands[count].size, MSG_WAITALL) !=
                     (ssize_t)commands[count].size)) {
                free(data[count]);
                break;
            }
            count++;
            continue;
        }
        while (count > 0) {
            int i = rand_r(&c->seed) % count;
            struct command command = commands[i];
            char *its_data = data[i];
            uint32_t length = command.type == CMD_READ ? command.size : 0;
            struct {
                uint32_t magic, error;
                uint64_t cookie;
            } __attribute__((packed)) wire = {htobe32(0x67446698), 0, command.cookie};
            bool is_alive = execute(c, command, its_data);

            is_alive = is_alive && send(c->socket, &wire, sizeof wire, MSG_NOSIGNAL) > 0 &&
                       send(c->socket, its_data, length, MSG_NOSIGNAL) == (ssize_t)length;
            free(its_data);
            count--;
            commands[i] = commands[count];
            data[i] = data[count];
            if (!is_alive)
                goto end;
        }
    }
end:
    while (count > 0)
        free(data[--count]);
    shutdown(c->socket, SHUT_RDWR);
    return NULL;
}

static void begin_connection(struct connection *c, unsigned seed)
{
    *c = (struct connection){.life = disk.life, .seed = seed};
    c->s = new_handle(&c->socket);
    CHECK(pthread_create(&c->thread, NULL, serve, c) == 0);
}

static void end_connection(struct connection *c)
{
    shutdown(c->socket, SHUT_RDWR);
    pthread_join(c->thread, NULL);
    close(c->socket);
}

/* Kill the server, which loses its cache, or only cut its connections. */
static void interrupt(struct connection *connections, int count, bool is_kill)
{
    pthread_mutex_lock(&disk.lock);
    if (is_kill) {
        disk.life++;
        memcpy(disk.cached, disk.stable, DISK_SIZE);
    }
    pthread_mutex_unlock(&disk.lock);
    for (int i = 0; i < count; i++)
        end_connection(&connections[i]);
}

static char model[DISK_SIZE], buffers[8][65536 * 3], source_image[DISK_SIZE];

/* A request in flight: which bytes it uses. */
struct busy {
    bool is_busy;
    enum nbdqueue_operation operation;
    uint64_t offset, length;
};

static bool is_free(const struct busy *all, uint64_t offset, uint64_t length)
{
    for (int i = 0; i < 8; i++) {
        if (all[i].is_busy && offset < all[i].offset + all[i].length &&
            all[i].offset < offset + length)
            return false;
    }
    return true;
}

/* Submit a random request that overlaps no other, and apply it to the model. */
static void submit_any(struct nbdqueue *q, struct busy *all, int slot)
{
    const enum nbdqueue_operation operations[] = {NBDQUEUE_WRITE, NBDQUEUE_WRITE, NBDQUEUE_READ,
                                                  NBDQUEUE_ZERO,  NBDQUEUE_COPY,  NBDQUEUE_FLUSH};
    struct busy *b = &all[slot];
    uint64_t length = (uint64_t)rand() % sizeof buffers[0] + 1;
    uint64_t offset = (uint64_t)rand() % (DISK_SIZE - length);

    b->operation = operations[rand() % 6];
    if (b->operation == NBDQUEUE_FLUSH)
        offset = length = 0;
    if (!is_free(all, offset, length))
        return;
    b->is_busy = true;
    b->offset = offset;
    b->length = length;
    memset(buffers[slot], rand(), length);
    if (b->operation == NBDQUEUE_WRITE)
        memcpy(model + offset, buffers[slot], length);
    else if (b->operation == NBDQUEUE_ZERO)
        memset(model + offset, 0, length);
    else if (b->operation == NBDQUEUE_COPY)
        memcpy(model + offset, source_image + offset, length);
    CHECK(nbdqueue_submit(q, b->operation, (uintptr_t)slot + 1,
                          b->operation == NBDQUEUE_COPY ? NULL : buffers[slot], length, offset,
                          rand() % 16 == 0 && b->operation == NBDQUEUE_WRITE ? LIBNBD_CMD_FLAG_FUA
                                                                             : 0) == 0);
}

/* Wait for a moment, and check what is done. */
static void reap_some(struct nbdqueue *q, struct busy *all, double seconds)
{
    struct nbdqueue_done done[MAX_DONE];
    int count = nbdqueue_wait(q, done, MAX_DONE, 1, seconds);

    for (int i = 0; i < count; i++) {
        struct busy *b = &all[done[i].token - 1];

        CHECK(b->is_busy);
        CHECK(done[i].error == 0);
        if (b->operation == NBDQUEUE_READ)
            CHECK(memcmp(buffers[done[i].token - 1], model + b->offset, b->length) == 0);
        b->is_busy = false;
    }
    nbdqueue_take(q, done, count);
}

/* Random requests, while the server is killed or cut at random. */
static void run_storm(unsigned seed)
{
    struct connection connections[2], lost[2];
    struct busy all[8] = {0};
    struct token token = {0};
    struct nbdqueue *q = nbdqueue_create(1 + seed % 5, 16384, give(&token));
    int count = 1 + (int)(seed % 2), source = memfd_create("source", MFD_CLOEXEC);

    srand(seed);
    for (size_t i = 0; i < DISK_SIZE; i++)
        source_image[i] = (char)(i / 5000 % 3 == 0 ? 0 : rand());
    CHECK(pwrite(source, source_image, DISK_SIZE, 0) == DISK_SIZE);
    memset(disk.stable, 'o', DISK_SIZE);
    memcpy(disk.cached, disk.stable, DISK_SIZE);
    memcpy(model, disk.stable, DISK_SIZE);
    CHECK(nbdqueue_set_reconnect(q, NBDQUEUE_TARGET, seed % 3 == 0 ? 100000 : LARGE) == 0);
    nbdqueue_set_sparse(q, 4096, false);
    nbdqueue_add_file(q, NBDQUEUE_SOURCE, source, 0, DISK_SIZE);
    for (int i = 0; i < count; i++) {
        begin_connection(&connections[i], seed + (unsigned)i);
        add(q, NBDQUEUE_TARGET, connections[i].s);
    }
    for (int step = 0; step < 400; step++) {
        int slot = rand() % 8;

        if (!all[slot].is_busy)
            submit_any(q, all, slot);
        if (rand() % 3 == 0)
            reap_some(q, all, rand() % 2 ? 0 : 0.01);
        if (rand() % 40 == 0) {
            bool is_kill = rand() % 3 != 0;
            int first = is_kill ? 0 : rand() % count;

            interrupt(connections + first, count - first, is_kill);
            memcpy(lost, connections, sizeof lost);
            for (int i = first; i < count; i++)
                begin_connection(&connections[i], (unsigned)rand());
            for (int i = rand() % 3; i > 0; i--)
                reap_some(q, all, 0.001);
            for (int i = first; i < count; i++) {
                while (nbdqueue_error(q, lost[i].s) == 0 && rand() % 4)
                    reap_some(q, all, 0.001);
                add(q, NBDQUEUE_TARGET, connections[i].s);
                nbdshim_destroy(lost[i].s);
            }
        }
    }
    while (nbdqueue_length(q) > 0)
        reap_some(q, all, 1);
    all[0] = (struct busy){.is_busy = true, .operation = NBDQUEUE_FLUSH};
    CHECK(nbdqueue_submit(q, NBDQUEUE_FLUSH, 1, NULL, 0, 0, 0) == 0);
    while (nbdqueue_length(q) > 0)
        reap_some(q, all, 1);
    CHECK(memcmp(disk.stable, model, DISK_SIZE) == 0);
    nbdqueue_destroy(q);
    for (int i = 0; i < count; i++) {
        end_connection(&connections[i]);
        nbdshim_destroy(connections[i].s);
    }
    CHECK(token.releases == 1);
    close(source);
}

static void the_disk_is_as_written_however_often_the_server_is_killed(void)
{
    for (unsigned seed = 0; seed < 20; seed++)
        run_storm(seed);
}

RUN_TESTS(TEST(a_lost_command_is_sent_again),
          TEST(what_was_not_flushed_is_written_again_before_anything_else),
          TEST(what_was_flushed_is_not_written_again), TEST(a_write_with_fua_is_not_written_again),
          TEST(changes_that_overlap_are_made_again_in_their_order),
          TEST(a_replay_that_was_interrupted_flushes_in_between),
          TEST(a_full_journal_is_flushed_before_the_next_change),
          TEST(a_flush_of_the_journal_that_fails_fails_the_next_change),
          TEST(a_copy_keeps_what_it_has_read),
          TEST(another_connection_takes_the_commands_of_a_lost_one),
          TEST(commands_fail_once_a_side_was_given_up), TEST(a_cancelled_command_is_not_sent_again),
          TEST(another_export_is_refused),
          TEST(the_disk_is_as_written_however_often_the_server_is_killed))
