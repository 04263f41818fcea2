// SPDX-License-Identifier: LGPL-2.0-or-later

/* The workloads that read and write in C, with buffers that are reused: the time that libnbd and
 * the server need, whatever language calls libnbd.
 *
 * Usage: limit KIND OPERATIONS WARM-UP SIZE DEPTH URI
 */

#define _POSIX_C_SOURCE 200809L /* clock_gettime in a C11 build */

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libnbd.h>

enum { MAX_DEPTH = 256 };

struct job {
    struct nbd_handle *h;
    uint64_t operations;
    size_t size;
    unsigned depth;
};

static void fail(const char *what)
{
    const char *reason = nbd_get_error();

    fprintf(stderr, "limit: %s: %s\n", what, reason ? reason : "unexpected result");
    exit(EXIT_FAILURE);
}

static void check(const char *what, int64_t result)
{
    if (result == -1)
        fail(what);
}

static void *allocate(size_t size)
{
    void *memory = malloc(size);

    if (!memory)
        fail("malloc");
    memset(memory, 'w', size);
    return memory;
}

static void sync_read(struct job *job)
{
    void *buffer = allocate(job->size);

    for (uint64_t i = 0; i < job->operations; i++)
        check("pread", nbd_pread(job->h, buffer, job->size, i * job->size, 0));
    free(buffer);
}

static void sync_write(struct job *job)
{
    void *buffer = allocate(job->size);

    for (uint64_t i = 0; i < job->operations; i++)
        check("pwrite", nbd_pwrite(job->h, buffer, job->size, i * job->size, 0));
    free(buffer);
}

/* A fixed set of buffers; the completion callback of a command returns its buffer. */
struct pool {
    struct slot {
        struct pool *pool;
        void *memory;
    } slots[MAX_DEPTH];
    struct slot *free[MAX_DEPTH];
    size_t nr_free;
};

static void fill_pool(struct pool *pool, const struct job *job)
{
    pool->nr_free = 0;
    for (unsigned i = 0; i < job->depth; i++) {
        pool->slots[i] = (struct slot){.pool = pool, .memory = allocate(job->size)};
        pool->free[pool->nr_free++] = &pool->slots[i];
    }
}

static void empty_pool(struct pool *pool, const struct job *job)
{
    for (unsigned i = 0; i < job->depth; i++)
        free(pool->slots[i].memory);
}

static int release_slot(void *user_data, int *error)
{
    struct slot *slot = user_data;

    if (*error)
        fail("a command failed");
    slot->pool->free[slot->pool->nr_free++] = slot;
    return 1;
}

static void drain(struct nbd_handle *h)
{
    while (nbd_aio_in_flight(h) > 0)
        check("poll", nbd_poll(h, -1));
}

static void pipelined(struct job *job, bool writing)
{
    struct nbd_handle *h = job->h;
    struct pool pool;

    fill_pool(&pool, job);
    for (uint64_t i = 0; i < job->operations; i++) {
        while (pool.nr_free == 0)
            check("poll", nbd_poll(h, -1));
        struct slot *slot = pool.free[--pool.nr_free];
        nbd_completion_callback callback = {.callback = release_slot, .user_data = slot};
        uint64_t offset = i * job->size;
        int64_t cookie = writing ? nbd_aio_pwrite(h, slot->memory, job->size, offset, callback, 0)
                                 : nbd_aio_pread(h, slot->memory, job->size, offset, callback, 0);
        check("aio", cookie);
    }
    drain(h);
    empty_pool(&pool, job);
}

static void pipelined_read(struct job *job)
{
    pipelined(job, false);
}

static void pipelined_write(struct job *job)
{
    pipelined(job, true);
}

static const struct kind {
    const char *name;
    void (*run)(struct job *job);
} kinds[] = {
    {"pread", sync_read},
    {"pread-into", sync_read},
    {"pwrite", sync_write},
    {"aio-pread", pipelined_read},
    {"aio-pread-bytearray", pipelined_read},
    {"aio-pwrite", pipelined_write},
};

static const struct kind *find_kind(const char *name)
{
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(kinds[i].name, name) == 0)
            return &kinds[i];
    fprintf(stderr, "limit: unknown workload %s\n", name);
    exit(EXIT_FAILURE);
}

static struct nbd_handle *open_handle(const char *uri)
{
    struct nbd_handle *h = nbd_create();

    if (!h)
        fail("create");
    check("connect_uri", nbd_connect_uri(h, uri));
    return h;
}

static double now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void measure(const struct kind *kind, struct job *job)
{
    double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);

    kind->run(job);
    wall = now(CLOCK_MONOTONIC) - wall;
    cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("{\"operations\": %" PRIu64 ", \"wall\": %.9f, \"cpu\": %.9f}\n", job->operations, wall,
           cpu);
}

int main(int argc, char *argv[])
{
    struct job job = {0};

    if (argc != 7) {
        fprintf(stderr, "usage: limit KIND OPERATIONS WARM-UP SIZE DEPTH URI\n");
        return EXIT_FAILURE;
    }
    const struct kind *kind = find_kind(argv[1]);
    uint64_t operations = strtoull(argv[2], NULL, 10), warm_up = strtoull(argv[3], NULL, 10);

    job.size = strtoull(argv[4], NULL, 10);
    job.depth = (unsigned)strtoul(argv[5], NULL, 10);
    if (job.depth > MAX_DEPTH)
        fail("depth");
    job.h = open_handle(argv[6]);
    job.operations = warm_up;
    kind->run(&job);
    job.operations = operations;
    measure(kind, &job);
    nbd_close(job.h);
    return EXIT_SUCCESS;
}
