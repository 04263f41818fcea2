// SPDX-License-Identifier: LGPL-2.0-or-later
#include "owner.h"

#include "nbdglue.h"

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

/* How many times more `release` fails, as it does where a signal handler raises. */
static _Thread_local int failing_releases;

void fail_releases(int times)
{
    failing_releases = times;
}

static int release(const uintptr_t *tokens, size_t count)
{
    if (failing_releases > 0) {
        failing_releases--;
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        struct token *t = (struct token *)tokens[i];

        t->releases++;
        if (t->released)
            t->released(t);
    }
    return 0;
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

void own_tokens(void)
{
    const struct nbdshim_upcalls upcalls = {
        .release = release,
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
