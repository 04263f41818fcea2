// SPDX-License-Identifier: LGPL-2.0-or-later
/* Upcalls for tests: tokens that count the upcalls made for them. */
#ifndef TOKENS_H
#define TOKENS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct token {
    int answer;                        /* the result of its callbacks */
    void (*inside)(struct token *t);   /* run inside its callbacks, if set */
    void (*released)(struct token *t); /* run inside its release, if set */
    void *data;                        /* for use by these two */
    atomic_int calls;                  /* how often its callbacks were called */
    atomic_int releases;               /* how often it was released */
    atomic_int error;                  /* the errno that its last callback received */
    atomic_size_t size; /* the total of bytes or extents that its callbacks received */
};

/* Make the next calls of `release` in this thread fail. */
void fail_releases(int times);

/* The number of buffers that `orphaned` has kept and `release` has not released yet. */
int kept_buffers(void);

/* Make the next calls of `orphaned` fail. */
void fail_to_keep(int times);

/* Set the result of `interrupted`: anything but 0 means that a signal handler has raised. */
void answer_interrupts(int answer);

/* Register the upcalls that count. */
void register_tokens(void);

static inline uintptr_t give(struct token *t)
{
    return (uintptr_t)t;
}

#endif
