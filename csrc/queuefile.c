// SPDX-License-Identifier: LGPL-2.0-or-later
/* A file as the endpoint of a queue; see queuefile.h. */

#include "queuefile.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h> /* musl's fcntl.h lacks some of it */
#include <linux/fs.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Write-back of smaller writes is left to the kernel, which can combine them. */
#define MIN_WRITTEN_BACK (64 * 1024)

/* Check the result of pread or pwrite.  Returns 0 to continue, or an errno. */
static int check(ssize_t done)
{
    if (done == 0)
        return EIO; /* the file has become shorter */
    return done < 0 && errno != EINTR ? errno : 0;
}

int queuefile_read(const struct queuefile *file, char *data, uint64_t length, uint64_t offset)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n =
            pread(file->fd, data + done, length - done, (off_t)(file->base + offset + done));
        int error = check(n);

        if (error != 0)
            return error;
        done += n > 0 ? (uint64_t)n : 0;
    }
    return 0;
}

/* Write all bytes; `at` is an offset in the file.  Returns 0 or an errno. */
static int write_all(int fd, const char *data, uint64_t length, uint64_t at)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pwrite(fd, data + done, length - done, (off_t)(at + done));
        int error = check(n);

        if (error != 0)
            return error;
        done += n > 0 ? (uint64_t)n : 0;
    }
    return 0;
}

/* Wait until a range is on the disk, and drop it from the page cache.  Returns 0 or an errno. */
static int finish(int fd, uint64_t at, uint64_t length)
{
    const unsigned all =
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;

    /*
     * fdatasync does not report again a write error that is reported here.  Other errors mean only
     * that this kind of file does not support the call.
     */
    if (sync_file_range(fd, (off_t)at, (off_t)length, all) == -1 &&
        (errno == EIO || errno == ENOSPC || errno == EDQUOT))
        return errno;
    (void)posix_fadvise(fd, (off_t)at, (off_t)length, POSIX_FADV_DONTNEED);
    return 0;
}

/* Start the write-back of a range, and finish that of the oldest range.  Returns 0 or an errno. */
static int write_back(struct queuefile *file, uint64_t at, uint64_t length)
{
    unsigned oldest = file->oldest;
    int error = 0;

    (void)sync_file_range(file->fd, (off_t)at, (off_t)length, SYNC_FILE_RANGE_WRITE);
    if (file->recent[oldest].length != 0)
        error = finish(file->fd, file->recent[oldest].at, file->recent[oldest].length);
    file->recent[oldest].at = at;
    file->recent[oldest].length = length;
    file->oldest = (oldest + 1) % QUEUEFILE_MAX_RECENT;
    return error;
}

int queuefile_write(struct queuefile *file, const char *data, uint64_t length, uint64_t offset)
{
    uint64_t at = file->base + offset;
    int error = write_all(file->fd, data, length, at);

    if (error == 0 && length >= MIN_WRITTEN_BACK)
        error = write_back(file, at, length);
    return error;
}

bool nbdshim_zero_range(int fd, uint64_t at, uint64_t length)
{
    uint64_t range[2] = {at, length};

    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length) ==
               0 ||
           fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length) ==
               0 ||
           ioctl(fd, BLKZEROOUT, range) == 0;
}

int queuefile_zero(struct queuefile *file, uint64_t length, uint64_t offset, const char *zeroes,
                   uint64_t size)
{
    if (nbdshim_zero_range(file->fd, file->base + offset, length))
        return 0;
    for (uint64_t done = 0, n; done < length; done += n) {
        int error;

        n = length - done < size ? length - done : size;
        error = queuefile_write(file, zeroes, n, offset + done);
        if (error != 0)
            return error;
    }
    return 0;
}

int queuefile_flush(const struct queuefile *file)
{
    return fdatasync(file->fd) == 0 ? 0 : errno;
}
