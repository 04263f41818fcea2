// SPDX-License-Identifier: LGPL-2.0-or-later
/* A file as the end of a queue; see queuefile.h. */

#include "queuefile.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* What has become of `done` bytes (of pread or pwrite).  Returns 0 to go on, or an errno. */
static int check(ssize_t done)
{
    if (done == 0)
        return EIO; /* the file is shorter than it was */
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

/* Write without a thought of the cache.  at is a place in the file. */
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

int queuefile_write(struct queuefile *file, const char *data, uint64_t length, uint64_t offset)
{
    return write_all(file->fd, data, length, file->base + offset);
}

/* Have the file system or the device make zeroes.  Returns whether it did. */
static bool zero_range(int fd, uint64_t at, uint64_t length)
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
    if (zero_range(file->fd, file->base + offset, length))
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
