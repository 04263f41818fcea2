// SPDX-License-Identifier: LGPL-2.0-or-later
/* Clear and examine the bytes of buffers; see nbdshim.h for the ABI. */

#include "buffer.h"

#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

bool nbdshim_is_zero(const void *p, size_t size)
{
    const char *bytes = p;

    return size == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, size - 1) == 0);
}

int64_t nbdshim_run(const void *p, size_t size, uint64_t offset, uint32_t block)
{
    const char *bytes = p;
    size_t n = block - offset % block, done = n < size ? n : size;
    bool is_zero = nbdshim_is_zero(bytes, done);

    while (done < size) {
        n = block < size - done ? block : size - done;
        if (nbdshim_is_zero(bytes + done, n) != is_zero)
            break;
        done += n;
    }
    return is_zero ? -(int64_t)done : (int64_t)done;
}

int nbdshim_clear_stale(int *state, void *p, size_t size)
{
    const struct timespec a_millisecond = {.tv_nsec = 1000000};

    for (int waited = 0; waited < 1000; waited++) {
        if (nbdshim_claim_stale(state)) {
            memset(p, 0, size);
            nbdshim_set_clean(state);
        }
        if (__atomic_load_n(state, __ATOMIC_ACQUIRE) == NBDSHIM_CLEAN)
            return 0;
        nanosleep(&a_millisecond, NULL);
    }
    return -1;
}

void nbdshim_clear(void *p, size_t size)
{
    memset(p, 0, size);
}

void nbdshim_advise_huge(void *p, size_t size)
{
#ifdef MADV_HUGEPAGE
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)p + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)p + size) & ~(page - 1);

    if (first < end)
        (void)madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)p;
    (void)size;
#endif
}
