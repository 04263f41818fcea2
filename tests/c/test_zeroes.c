// SPDX-License-Identifier: LGPL-2.0-or-later
/* How copies find zeroes in what they have read, and what they do with them. */
#include "check.h"
#include "rig.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define BLOCK 4096
#define NBD_CMD_WRITE 1

static char other_image[DISK_SIZE];

/* A file of DISK_SIZE bytes with these contents. */
static int new_file(const char *bytes)
{
    int fd = memfd_create("zeroes", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK(pwrite(fd, bytes, DISK_SIZE, 0) == DISK_SIZE);
    return fd;
}

/* Fill a disk with runs of data and zeroes that begin and end near multiples of `block`. */
static void fill_with_runs(char *bytes, uint32_t block)
{
    bool is_data = true;

    for (size_t at = 0, end; at < DISK_SIZE; at = end, is_data = !is_data) {
        end = at + (size_t)(rand() % 5) * block + (size_t)(rand() % 3) + block - at % block - 1;
        if (end > DISK_SIZE)
            end = DISK_SIZE;
        memset(bytes + at, is_data ? 'd' : 0, end - at);
    }
}

/* The number of bytes in blocks that have only zeroes in them. */
static uint64_t zero_bytes(const char *bytes, uint32_t block)
{
    uint64_t sum = 0;

    for (size_t at = 0; at < DISK_SIZE; at += block)
        sum += nbdshim_is_zero(bytes + at, block) ? block : 0;
    return sum;
}

/* Set up a queue whose source is a file with the contents of other_image. */
static void set_up_source(struct rig *rig, int *source)
{
    *source = new_file(other_image);
    nbdqueue_add_file(rig->q, NBDQUEUE_SOURCE, *source, 0, DISK_SIZE);
}

static void copy_all(struct rig *rig)
{
    CHECK(nbdqueue_submit(rig->q, NBDQUEUE_COPY, 1, NULL, DISK_SIZE, 0, 0) == 0);
    finish(rig, 1);
    CHECK(each_ended_once(rig, 1));
}

static void check_counts(const struct rig *rig, uint64_t zeroed)
{
    CHECK(rig->done[0].moved == DISK_SIZE);
    CHECK(rig->done[0].zeroed == zeroed);
    CHECK(nbdqueue_zeroed(rig->q) == zeroed);
    CHECK(nbdqueue_copied(rig->q) == DISK_SIZE - zeroed);
    CHECK(nbdqueue_read(rig->q) == DISK_SIZE);
}

static void a_run_ends_where_the_next_block_differs(void)
{
    memset(image, 0, sizeof image);
    image[3 * BLOCK] = image[5 * BLOCK - 1] = 'd';
    CHECK(nbdshim_run(image, 8 * BLOCK, 0, BLOCK) == -3 * BLOCK);
    CHECK(nbdshim_run(image + 3 * BLOCK, 5 * BLOCK, 3 * BLOCK, BLOCK) == 2 * BLOCK);
    CHECK(nbdshim_run(image + 5 * BLOCK, 3 * BLOCK, 5 * BLOCK, BLOCK) == -3 * BLOCK);
}

static void blocks_begin_at_multiples_of_their_size(void)
{
    memset(image, 0, sizeof image);
    image[100] = 'd';
    CHECK(nbdshim_run(image, 2 * BLOCK, BLOCK - 100, BLOCK) == -100);
    CHECK(nbdshim_run(image, 2 * BLOCK, BLOCK - 101, BLOCK) == 101);
    CHECK(nbdshim_run(image + 101, 50, 101, BLOCK) == -50);
}

static void a_copy_of_files_makes_holes_for_zeroes(void)
{
    const uint32_t blocks[] = {512, 4096, 65536};

    for (unsigned seed = 0; seed < 30; seed++) {
        uint32_t block = blocks[seed % 3];
        struct rig rig = {.server = -1};
        int source, target;

        srand(seed);
        fill_with_runs(other_image, block);
        memset(image, 'o', sizeof image);
        target = new_file(image);
        rig.q = nbdqueue_create(4, 65536, give(&rig.token));
        nbdqueue_add_file(rig.q, NBDQUEUE_TARGET, target, 0, DISK_SIZE);
        set_up_source(&rig, &source);
        nbdqueue_set_sparse(rig.q, block, false);
        copy_all(&rig);
        CHECK(pread(target, image, DISK_SIZE, 0) == DISK_SIZE);
        CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
        check_counts(&rig, zero_bytes(other_image, block));
        CHECK(nbdqueue_written(rig.q) == nbdqueue_copied(rig.q));
        tear_down(&rig);
        close(target);
        close(source);
    }
}

static void a_copy_to_a_disk_zeroes_blocks_of_zeroes(void)
{
    for (unsigned seed = 0; seed < 3; seed++) {
        struct rig rig;
        int source;

        srand(seed);
        fill_with_runs(other_image, BLOCK);
        set_up_with(&rig, connected(), 4, 65536);
        set_up_source(&rig, &source);
        memset(image, 'o', sizeof image);
        CHECK(nbdcall_pwrite(rig.s, image, DISK_SIZE, 0, 0) == 0);
        nbdqueue_set_sparse(rig.q, 512, false);
        copy_all(&rig);
        CHECK(nbdcall_pread(rig.s, image, DISK_SIZE, 0, 0) == 0);
        CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
        check_counts(&rig, zero_bytes(other_image, 512));
        tear_down(&rig);
        close(source);
    }
}

static void nothing_is_sent_for_zeroes_to_a_target_that_is_zero(void)
{
    struct rig rig;
    int source;

    memset(other_image, 0, sizeof other_image);
    set_up(&rig, 4, 65536);
    set_up_source(&rig, &source);
    nbdqueue_set_sparse(rig.q, BLOCK, true);
    copy_all(&rig);
    check_counts(&rig, DISK_SIZE);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_ZERO, 1, NULL, DISK_SIZE, 0, 0) == 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    CHECK(nbdqueue_zeroed(rig.q) == 2 * DISK_SIZE);
    CHECK(nbdqueue_written(rig.q) == 0);
    CHECK(recv(rig.server, image, 1, MSG_DONTWAIT) == -1);
    tear_down(&rig);
    close(source);
}

static void a_server_without_a_zero_command_gets_zeroes_as_data(void)
{
    struct rig rig;
    int source;

    memset(other_image, 0, sizeof other_image);
    set_up(&rig, 4, DISK_SIZE); /* an oldstyle server, which has no flags */
    set_up_source(&rig, &source);
    nbdqueue_set_sparse(rig.q, BLOCK, false);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_COPY, 1, NULL, BLOCK, 0, 0) == 0);
    CHECK(nbdqueue_wait(rig.q, rig.done, MAX_DONE, 1, 0) == 0);
    CHECK(receive_command(rig.server).type == NBD_CMD_WRITE);
    tear_down(&rig);
    close(source);
}

static void what_is_written_to_nothing_is_discarded(void)
{
    struct rig rig = {.server = -1};
    int source;

    memset(other_image, 0, sizeof other_image);
    rig.q = nbdqueue_create(4, 65536, give(&rig.token));
    nbdqueue_add_null(rig.q, INT64_MAX);
    set_up_source(&rig, &source);
    nbdqueue_set_sparse(rig.q, BLOCK, false);
    copy_all(&rig);
    check_counts(&rig, 0);
    CHECK(nbdqueue_written(rig.q) == 0);
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_ZERO, 1, NULL, UINT64_C(1) << 40, 1, 0) == 0);
    finish(&rig, 1);
    CHECK(each_ended_once(&rig, 1));
    CHECK(nbdqueue_submit(rig.q, NBDQUEUE_COPY, 1, NULL, SIZE, DISK_SIZE, 0) == 0);
    finish(&rig, 1);
    CHECK(rig.done[0].error == EINVAL); /* the source ends before */
    tear_down(&rig);
    close(source);
}

static void blocks_are_as_large_as_those_of_the_target(void)
{
    struct rig rig;
    int source;

    memset(other_image, 'd', sizeof other_image);
    memset(other_image + BLOCK + 512, 0, 2 * BLOCK);
    set_up_with(&rig, connected_to_blocks(), 4, 65536);
    set_up_source(&rig, &source);
    nbdqueue_set_sparse(rig.q, 512, false);
    copy_all(&rig);
    CHECK(nbdcall_pread(rig.s, image, DISK_SIZE, 0, 0) == 0);
    CHECK(memcmp(image, other_image, DISK_SIZE) == 0);
    check_counts(&rig, nbdqueue_minimum(rig.q, NBDQUEUE_TARGET) == BLOCK ? BLOCK : 2 * BLOCK);
    tear_down(&rig);
    close(source);
}

RUN_TESTS(TEST(a_run_ends_where_the_next_block_differs),
          TEST(blocks_begin_at_multiples_of_their_size),
          TEST(a_copy_of_files_makes_holes_for_zeroes),
          TEST(a_copy_to_a_disk_zeroes_blocks_of_zeroes),
          TEST(nothing_is_sent_for_zeroes_to_a_target_that_is_zero),
          TEST(a_server_without_a_zero_command_gets_zeroes_as_data),
          TEST(what_is_written_to_nothing_is_discarded),
          TEST(blocks_are_as_large_as_those_of_the_target))
