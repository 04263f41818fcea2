// SPDX-License-Identifier: LGPL-2.0-or-later

/* The workloads of workloads.py in C, with buffers that are reused: the time that libnbd and the
 * server need, whatever language calls libnbd.
 *
 * Usage: limit KIND OPERATIONS WARM-UP SIZE DEPTH [URI...]
 */

#define _POSIX_C_SOURCE 200809L /* clock_gettime in a C11 build */

#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include <libnbd.h>

enum { MAX_HANDLES = 16, MAX_DEPTH = 256, EXTENTS = 100000 };

struct job {
    struct nbd_handle *handles[MAX_HANDLES];
    size_t nr_handles;
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

static void getter(struct job *job)
{
    for (uint64_t i = 0; i < job->operations; i++)
        check("get_size", nbd_get_size(job->handles[0]));
}

static int debug_message(void *user_data, const char *context, const char *text)
{
    (void)context;
    *(size_t *)user_data += strlen(text);
    return 0;
}

static void debug_callback(struct job *job)
{
    struct nbd_handle *h = job->handles[0];
    size_t characters = 0;
    nbd_debug_callback callback = {.callback = debug_message, .user_data = &characters};

    check("set_debug_callback", nbd_set_debug_callback(h, callback));
    check("set_debug", nbd_set_debug(h, true));
    for (uint64_t i = 0; i < job->operations / 2; i++)
        check("get_size", nbd_get_size(h));
    check("set_debug", nbd_set_debug(h, false));
    check("clear_debug_callback", nbd_clear_debug_callback(h));
}

static void read_with(struct nbd_handle *h, uint64_t operations, size_t size)
{
    void *buffer = allocate(size);

    for (uint64_t i = 0; i < operations; i++)
        check("pread", nbd_pread(h, buffer, size, i * size, 0));
    free(buffer);
}

static void sync_read(struct job *job)
{
    read_with(job->handles[0], job->operations, job->size);
}

static void sync_write(struct job *job)
{
    void *buffer = allocate(job->size);

    for (uint64_t i = 0; i < job->operations; i++)
        check("pwrite", nbd_pwrite(job->handles[0], buffer, job->size, i * job->size, 0));
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
    struct nbd_handle *h = job->handles[0];
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

static int count_bytes(void *user_data, const void *data, size_t count, uint64_t offset,
                       unsigned status, int *error)
{
    (void)data, (void)offset, (void)status;
    if (*error)
        fail("chunk");
    *(uint64_t *)user_data += count;
    return 0;
}

static void structured_read(struct job *job)
{
    void *buffer = allocate(job->size);
    uint64_t received = 0;

    for (uint64_t i = 0; i < job->operations; i++) {
        nbd_chunk_callback callback = {.callback = count_bytes, .user_data = &received};
        check("pread_structured",
              nbd_pread_structured(job->handles[0], buffer, job->size, i * job->size, callback, 0));
    }
    if (received != job->operations * job->size)
        fail("pread_structured");
    free(buffer);
}

static int count_extents(void *user_data, const char *context, uint64_t offset, uint32_t *entries,
                         size_t nr_entries, int *error)
{
    (void)context, (void)offset, (void)entries;
    if (*error)
        fail("extents");
    *(uint64_t *)user_data += nr_entries / 2;
    return 0;
}

static void block_status(struct job *job)
{
    struct nbd_handle *h = job->handles[0];
    int64_t count = nbd_get_size(h);
    uint64_t found = 0;

    check("get_size", count);
    for (uint64_t i = 0; i < job->operations; i++) {
        nbd_extent_callback callback = {.callback = count_extents, .user_data = &found};
        check("block_status", nbd_block_status(h, (uint64_t)count, 0, callback, 0));
    }
    if (found != job->operations * EXTENTS)
        fail("block_status");
}

struct share {
    pthread_t thread;
    struct nbd_handle *h;
    uint64_t operations;
    size_t size;
};

static void *read_share(void *data)
{
    struct share *share = data;

    read_with(share->h, share->operations, share->size);
    return NULL;
}

static void threads(struct job *job)
{
    struct share shares[MAX_HANDLES];

    for (size_t i = 0; i < job->nr_handles; i++) {
        shares[i] = (struct share){.h = job->handles[i],
                                   .operations = job->operations / job->nr_handles,
                                   .size = job->size};
        if (pthread_create(&shares[i].thread, NULL, read_share, &shares[i]))
            fail("pthread_create");
    }
    for (size_t i = 0; i < job->nr_handles; i++)
        pthread_join(shares[i].thread, NULL);
}

static void create_and_close(struct job *job)
{
    for (uint64_t i = 0; i < job->operations; i++) {
        struct nbd_handle *h = nbd_create();

        if (!h)
            fail("create");
        nbd_close(h);
    }
}

static const struct kind {
    const char *name;
    void (*run)(struct job *job);
} kinds[] = {
    {"getter", getter},
    {"debug-callback", debug_callback},
    {"pread", sync_read},
    {"pread-into", sync_read},
    {"pwrite", sync_write},
    {"aio-pread", pipelined_read},
    {"aio-pread-bytearray", pipelined_read},
    {"aio-pwrite", pipelined_write},
    {"pread-structured", structured_read},
    {"block-status", block_status},
    {"threads", threads},
    {"handles", create_and_close},
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
    check("add_meta_context", nbd_add_meta_context(h, LIBNBD_CONTEXT_BASE_ALLOCATION));
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
    struct rusage usage;

    kind->run(job);
    wall = now(CLOCK_MONOTONIC) - wall;
    cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"operations\": %" PRIu64 ", \"wall\": %.9f, \"cpu\": %.9f, "
           "\"max_rss_kib\": %ld, \"page_faults\": %ld}\n",
           job->operations, wall, cpu, usage.ru_maxrss, usage.ru_minflt);
}

int main(int argc, char *argv[])
{
    struct job job = {.nr_handles = 0};

    if (argc < 6 || argc - 6 > MAX_HANDLES) {
        fprintf(stderr, "usage: limit KIND OPERATIONS WARM-UP SIZE DEPTH [URI...]\n");
        return EXIT_FAILURE;
    }
    const struct kind *kind = find_kind(argv[1]);
    uint64_t operations = strtoull(argv[2], NULL, 10), warm_up = strtoull(argv[3], NULL, 10);

    job.size = strtoull(argv[4], NULL, 10);
    job.depth = (unsigned)strtoul(argv[5], NULL, 10);
    if (job.depth > MAX_DEPTH)
        fail("depth");
    for (int i = 6; i < argc; i++)
        job.handles[job.nr_handles++] = open_handle(argv[i]);
    job.operations = warm_up;
    kind->run(&job);
    job.operations = operations;
    measure(kind, &job);
    for (size_t i = 0; i < job.nr_handles; i++)
        nbd_close(job.handles[i]);
    return EXIT_SUCCESS;
}
