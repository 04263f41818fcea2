// SPDX-License-Identifier: LGPL-2.0-or-later
/* The rows of the table in every_call.h, which every_call.py generates. */
#ifndef CALL_H
#define CALL_H

#include "nbdglue.h"
#include "tokens.h"

/* Arguments of every type.  libnbd accepts them, although the call may fail. */
struct arguments {
    char *text;
    char *argv[2];
    char data[512], buffer[512], address[128];
    uint32_t address_size;
    int state; /* of buffer, an enum nbdshim_state */
    struct token tokens[2];
};

struct call {
    const char *name;
    int64_t (*make)(struct nbdshim *s, struct arguments *a);
    int tokens;          /* the number of tokens that it takes */
    bool refuses_with_0; /* because it returns a pointer or an unsigned number */
    bool is_lock_free;   /* callbacks may make it */
};

#endif
