// SPDX-License-Identifier: LGPL-2.0-or-later
/* What every_call.h, which every_call.py writes, is a table of. */
#ifndef CALL_H
#define CALL_H

#include "nbdglue.h"
#include "owner.h"

/* Arguments of every type: a call of libnbd takes them, but need not succeed. */
struct arguments {
    char *text;
    char *argv[2];
    char data[512], buffer[512], address[128];
    uint32_t address_size;
    int state; /* of buffer */
    struct token tokens[2];
};

struct call {
    const char *name;
    int64_t (*make)(struct nbdshim *s, struct arguments *a);
    int tokens;          /* how many it takes */
    bool refuses_with_0; /* it returns a pointer or an unsigned number */
    bool is_lock_free;   /* callbacks may make it */
};

#endif
