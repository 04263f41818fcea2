// SPDX-License-Identifier: LGPL-2.0-or-later

/* The workloads that read and write in C, with buffers that are reused: the time that libnbd and
 * the server need, whatever language calls libnbd.
 *
 * Usage: limit KIND OPERATIONS WARM-UP SIZE DEPTH URI
 */

#define _POSIX_C_SOURCE 200809L /* clock_gettime in a C11 build */

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libnbd.h>

enum { MAX_DEPTH = 64 };

static struct nbd_handle *h;
static size_t size, depth, nr_free;
static void *memory[MAX_DEPTH]; /* the buffers that no command uses are the first */

static void check(const char *what, bool is_good)
{
    const char *reason = nbd_get_error();

    if (is_good)
        return;
    fprintf(stderr, "limit: %s: %s\n", what, reason ? reason : "unexpected result");
    exit(EXIT_FAILURE);
}

static int release(void *buffer, int *error)
{
    check("a command failed", *error == 0);
    memory[nr_free++] = buffer;
    return 1;
}

static void start(bool writing, uint64_t offset)
{
    while (nr_free == 0)
        check("poll", nbd_poll(h, -1) != -1);
    void *buffer = memory[--nr_free];
    nbd_completion_callback callback = {.callback = release, .user_data = buffer};
    int64_t cookie = writing ? nbd_aio_pwrite(h, buffer, size, offset, callback, 0)
                             : nbd_aio_pread(h, buffer, size, offset, callback, 0);

    check("aio", cookie != -1);
}

static void run(const char *kind, uint64_t operations)
{
    bool pipelined = strncmp(kind, "aio-", 4) == 0, writing = strstr(kind, "pwrite");

    for (uint64_t offset = 0; offset < operations * size; offset += size)
        if (pipelined)
            start(writing, offset);
        else if (writing)
            check("pwrite", nbd_pwrite(h, memory[0], size, offset, 0) == 0);
        else
            check("pread", nbd_pread(h, memory[0], size, offset, 0) == 0);
    while (nbd_aio_in_flight(h) > 0)
        check("poll", nbd_poll(h, -1) != -1);
}

static double now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int argc, char *argv[])
{
    check("usage: limit KIND OPERATIONS WARM-UP SIZE DEPTH URI", argc == 7);
    size = strtoull(argv[4], NULL, 10);
    depth = strtoull(argv[5], NULL, 10);
    check("depth", depth <= MAX_DEPTH);
    for (; nr_free < depth; nr_free++) {
        memory[nr_free] = malloc(size);
        check("malloc", memory[nr_free]);
        memset(memory[nr_free], 'w', size);
    }
    h = nbd_create();
    check("connect_uri", h && nbd_connect_uri(h, argv[6]) == 0);
    run(argv[1], strtoull(argv[3], NULL, 10));
    double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    run(argv[1], strtoull(argv[2], NULL, 10));
    wall = now(CLOCK_MONOTONIC) - wall;
    cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("{\"operations\": %s, \"wall\": %.9f, \"cpu\": %.9f}\n", argv[2], wall, cpu);
    nbd_close(h);
    return EXIT_SUCCESS;
}
