// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * A file or block device as the end of a queue.  It is read and written at once, in the thread
 * that has the queue's turn.
 *
 * What is written goes on to the disk meanwhile, and then out of the system's cache: a copy of a
 * large disk would fill all of it, and what other programs use would have to go.
 */
#ifndef NBDSHIM_QUEUEFILE_H
#define NBDSHIM_QUEUEFILE_H

#include <stdint.h>

/* So many writes are on their way to the disk before the oldest is waited for. */
#define QUEUEFILE_MAX_RECENT 32

struct queuefile {
    int fd;        /* the caller's; -1 if there is no file */
    uint64_t base; /* where the end begins in the file, in bytes */
    struct {
        uint64_t at, length;
    } recent[QUEUEFILE_MAX_RECENT]; /* what was written last; a length of 0 is none */
    unsigned oldest;
};

/* All of these take an offset from base, and return 0 or an errno. */

int queuefile_read(const struct queuefile *file, char *data, uint64_t length, uint64_t offset);

int queuefile_write(struct queuefile *file, const char *data, uint64_t length, uint64_t offset);

/* Make a hole, or write zeroes: from `zeroes`, which has `size` of them. */
int queuefile_zero(struct queuefile *file, uint64_t length, uint64_t offset, const char *zeroes,
                   uint64_t size);

int queuefile_flush(const struct queuefile *file);

#endif
