// SPDX-License-Identifier: LGPL-2.0-or-later
/* The side above the shim: tokens that count what is called up for them. */
#ifndef OWNER_H
#define OWNER_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct token {
    int answer;                        /* what its callbacks return */
    void (*inside)(struct token *t);   /* run inside its callbacks, if set */
    void (*released)(struct token *t); /* run inside its release, if set */
    void *data;                        /* for these two */
    atomic_int calls;                  /* how often a callback was called */
    atomic_int releases;               /* how often it was released */
    atomic_int error;                  /* the errno that its last callback was shown */
    atomic_size_t size;                /* the bytes or extents that its callbacks were shown */
};

/* Let the next calls of `release` in this thread fail. */
void fail_releases(int times);

/* How many buffers `orphaned` has kept and `release` has not let go yet. */
int kept_buffers(void);

/* Let the next calls of `orphaned` fail. */
void fail_to_keep(int times);

/* What `interrupted` returns from now on: not 0 if a signal handler has raised an exception. */
void answer_interrupts(int answer);

/* Make the functions that count the shim's upcalls. */
void own_tokens(void);

static inline uintptr_t give(struct token *t)
{
    return (uintptr_t)t;
}

#endif
