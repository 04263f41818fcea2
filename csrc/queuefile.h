// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * A file or block device as the endpoint of a queue.  The thread that has the queue's turn reads
 * and writes it synchronously.
 *
 * The kernel starts to write large writes back at once, and later drops their pages.  Without that,
 * the copy of a large disk would fill the page cache and evict what other programs use.
 */
#ifndef NBDSHIM_QUEUEFILE_H
#define NBDSHIM_QUEUEFILE_H

#include "nbdshim.h"

#include <stdint.h>

/* The largest number of writes under write-back; one more waits for the oldest. */
#define QUEUEFILE_MAX_RECENT 32

struct queuefile {
    int fd;        /* owned by the caller; -1 if there is no file */
    uint64_t base; /* the endpoint's offset in the file, in bytes */
    struct {
        uint64_t at, length;
    } recent[QUEUEFILE_MAX_RECENT]; /* the latest writes, as a ring; a length of 0 is none */
    unsigned oldest;                /* the next place in the ring */
};

/* Offsets are relative to base.  All of these return 0 or an errno. */

int queuefile_read(const struct queuefile *file, char *data, uint64_t length, uint64_t offset);

int queuefile_write(struct queuefile *file, const char *data, uint64_t length, uint64_t offset);

/* Punch a hole or, where that is impossible, write zeroes from a buffer of `size` zero bytes. */
int queuefile_zero(struct queuefile *file, uint64_t length, uint64_t offset, const char *zeroes,
                   uint64_t size);

int queuefile_flush(const struct queuefile *file);

#endif
