// SPDX-License-Identifier: LGPL-2.0-or-later
/* A file as the endpoint of a queue.  This program replaces the system calls for write-back. */
#include "check.h"
#include "queuefile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SIZE (256 * 1024)

static int disk_error;  /* the errno with which waiting for the disk fails, or 0 */
static unsigned begun;  /* ranges whose write-back was started */
static unsigned waited; /* ranges whose write-back was waited for */
static unsigned forgot; /* ranges dropped from the page cache */
static off_t finished;  /* the offset of the range waited for last */
static char zeroes[SIZE];
static char data[SIZE];

int sync_file_range(int fd, off_t offset, off_t count, unsigned int flags)
{
    (void)fd, (void)count;
    if (flags == SYNC_FILE_RANGE_WRITE) {
        begun++;
        return 0;
    }
    waited++;
    finished = offset;
    errno = disk_error;
    return disk_error == 0 ? 0 : -1;
}

int posix_fadvise(int fd, off_t offset, off_t len, int advise)
{
    (void)fd, (void)offset, (void)len, (void)advise;
    forgot++;
    return 0;
}

/* Pretend that no file system can punch holes. */
int fallocate(int fd, int mode, off_t offset, off_t len)
{
    (void)fd, (void)mode, (void)offset, (void)len;
    errno = EOPNOTSUPP;
    return -1;
}

/* An empty file without a name; the endpoint starts at offset `base`. */
static struct queuefile temporary(uint64_t base)
{
    char name[] = "/tmp/queuefile-XXXXXX";
    struct queuefile file = {.fd = mkstemp(name), .base = base};

    unlink(name);
    disk_error = 0;
    begun = waited = forgot = 0;
    finished = -1;
    return file;
}

static void data_is_read_back_from_its_offset(void)
{
    struct queuefile file = temporary(512);
    char got[5] = "";

    REQUIRE(queuefile_write(&file, "disk", 5, 100) == 0);
    CHECK(pread(file.fd, got, 5, 612) == 5 && strcmp(got, "disk") == 0);
    memset(got, 0, sizeof got);
    CHECK(queuefile_read(&file, got, 5, 100) == 0 && strcmp(got, "disk") == 0);
    CHECK(queuefile_flush(&file) == 0);
    close(file.fd);
}

static void a_file_that_is_too_short_is_eio(void)
{
    struct queuefile file = temporary(0);
    char got[5];

    CHECK(queuefile_write(&file, "disk", 4, 0) == 0);
    CHECK(queuefile_read(&file, got, 5, 0) == EIO);
    close(file.fd);
}

static void zeroes_are_written_if_holes_cannot_be_punched(void)
{
    struct queuefile file = temporary(0);
    char got[10];

    REQUIRE(queuefile_write(&file, "0123456789", 10, 0) == 0);
    CHECK(queuefile_zero(&file, 7, 2, zeroes, 3) == 0);
    CHECK(pread(file.fd, got, 10, 0) == 10 && memcmp(got,
                                                     "01\0\0\0\0\0\0\0"
                                                     "9",
                                                     10) == 0);
    close(file.fd);
}

static void writes_are_written_back_and_the_oldest_leaves_the_cache(void)
{
    struct queuefile file = temporary(SIZE);

    for (unsigned i = 0; i < QUEUEFILE_MAX_RECENT; i++)
        REQUIRE(queuefile_write(&file, data, SIZE, (uint64_t)SIZE * i) == 0);
    CHECK(begun == QUEUEFILE_MAX_RECENT && waited == 0 && forgot == 0);
    CHECK(queuefile_write(&file, data, SIZE, 0) == 0);
    CHECK(waited == 1 && forgot == 1 && finished == SIZE);
    close(file.fd);
}

static void small_writes_are_left_to_the_kernel(void)
{
    struct queuefile file = temporary(0);

    for (unsigned i = 0; i < 2 * QUEUEFILE_MAX_RECENT; i++)
        REQUIRE(queuefile_write(&file, data, 4096, 4096 * (uint64_t)i) == 0);
    CHECK(begun == 0 && waited == 0);
    close(file.fd);
}

/* Because fdatasync would not report the error again. */
static void a_write_error_during_write_back_is_reported(void)
{
    struct queuefile file = temporary(0);

    for (unsigned i = 0; i < QUEUEFILE_MAX_RECENT; i++)
        REQUIRE(queuefile_write(&file, data, SIZE, (uint64_t)SIZE * i) == 0);
    disk_error = EIO;
    CHECK(queuefile_write(&file, data, SIZE, 0) == EIO);
    disk_error = ENOSPC;
    CHECK(queuefile_write(&file, data, SIZE, 0) == ENOSPC);
    close(file.fd);
}

static void a_file_without_write_back_of_ranges_is_not_an_error(void)
{
    struct queuefile file = temporary(0);

    disk_error = EINVAL;
    for (unsigned i = 0; i <= QUEUEFILE_MAX_RECENT; i++)
        REQUIRE(queuefile_write(&file, data, SIZE, 0) == 0);
    CHECK(waited == 1);
    close(file.fd);
}

RUN_TESTS(TEST(data_is_read_back_from_its_offset), TEST(a_file_that_is_too_short_is_eio),
          TEST(zeroes_are_written_if_holes_cannot_be_punched),
          TEST(writes_are_written_back_and_the_oldest_leaves_the_cache),
          TEST(small_writes_are_left_to_the_kernel),
          TEST(a_write_error_during_write_back_is_reported),
          TEST(a_file_without_write_back_of_ranges_is_not_an_error))
