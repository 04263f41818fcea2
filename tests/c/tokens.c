// SPDX-License-Identifier: LGPL-2.0-or-later
#include "tokens.h"

#include "nbdglue.h"

#include <pthread.h>
#include <stdbool.h>

#include <libnbd.h>

static int called(uintptr_t token, size_t size, int error)
{
    struct token *t = (struct token *)token;

    t->calls++;
    t->size += size;
    t->error = error;
    if (t->inside)
        t->inside(t);
    return t->answer;
}

/* How often `release` still fails, as if a signal handler had raised. */
static _Thread_local int failing_releases;

void fail_releases(int times)
{
    failing_releases = times;
}

/* The tokens of the buffers that `orphaned` keeps; 0 marks a free place. */
static uintptr_t kept[256];
static pthread_mutex_t kept_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_int failing_keeps;

void fail_to_keep(int times)
{
    failing_keeps = times;
}

/* Replace a token in `kept` by another one; returns whether it was there. */
static bool replace_kept(uintptr_t token, uintptr_t other)
{
    bool found = false;

    pthread_mutex_lock(&kept_lock);
    for (size_t i = 0; i < sizeof kept / sizeof kept[0] && !found; i++) {
        found = kept[i] == token;
        if (found)
            kept[i] = other;
    }
    pthread_mutex_unlock(&kept_lock);
    return found;
}

int kept_buffers(void)
{
    int count = 0;

    pthread_mutex_lock(&kept_lock);
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
        count += kept[i] != 0;
    pthread_mutex_unlock(&kept_lock);
    return count;
}

static int orphaned(uintptr_t token)
{
    if (atomic_load(&failing_keeps) > 0) {
        failing_keeps--;
        return -1;
    }
    return replace_kept(0, token) ? 0 : -1;
}

static int release(const uintptr_t *tokens, size_t count)
{
    if (failing_releases > 0) {
        failing_releases--;
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        struct token *t = (struct token *)tokens[i];

        if (replace_kept(tokens[i], 0))
            continue;
        t->releases++;
        if (t->released)
            t->released(t);
    }
    return 0;
}

static atomic_int answer_to_interrupts;

void answer_interrupts(int answer)
{
    answer_to_interrupts = answer;
}

static int interrupted(void)
{
    return answer_to_interrupts;
}

static int chunk(uintptr_t token, size_t subbuf_at, size_t count, uint64_t offset, unsigned status,
                 int error, uintptr_t error_at)
{
    (void)subbuf_at, (void)offset, (void)status, (void)error_at;
    return called(token, count, error);
}

static int completion(uintptr_t token, int error, uintptr_t error_at)
{
    (void)error_at;
    return called(token, 0, error);
}

static int debug(uintptr_t token, const char *context, const char *msg)
{
    (void)context, (void)msg;
    return called(token, 0, 0);
}

static int extent(uintptr_t token, const char *metacontext, uint64_t offset,
                  const uint32_t *entries, size_t nr_entries, int error, uintptr_t error_at)
{
    (void)metacontext, (void)offset, (void)entries, (void)error_at;
    return called(token, nr_entries / 2, error);
}

static int list(uintptr_t token, const char *name, const char *description)
{
    (void)name, (void)description;
    return called(token, 0, 0);
}

static int context(uintptr_t token, const char *name)
{
    (void)name;
    return called(token, 0, 0);
}

#ifdef LIBNBD_HAVE_NBD_EXTENT64_CALLBACK
static int extent64(uintptr_t token, const char *metacontext, uint64_t offset,
                    const uint64_t *entries, size_t nr_entries, int error, uintptr_t error_at)
{
    (void)metacontext, (void)offset, (void)entries, (void)error_at;
    return called(token, nr_entries, error);
}
#endif

void register_tokens(void)
{
    const struct nbdshim_upcalls upcalls = {
        .release = release,
        .interrupted = interrupted,
        .orphaned = orphaned,
        .chunk = chunk,
        .completion = completion,
        .debug = debug,
        .extent = extent,
        .list = list,
        .context = context,
#ifdef LIBNBD_HAVE_NBD_EXTENT64_CALLBACK
        .extent64 = extent64,
#endif
    };

    nbdshim_register(&upcalls);
}
