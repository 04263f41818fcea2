// SPDX-License-Identifier: LGPL-2.0-or-later
/* A queue for a test, with its handle and its server. */
#ifndef RIG_H
#define RIG_H

#include "handle.h"
#include "queue.h"
#include "owner.h"
#include "server.h"

#define SIZE 4096
#define MAX_DONE 16
#define FOR_EVER (-1.0)

/* What is written, and read into: a request has the bytes at its offset. */
extern char image[DISK_SIZE];

/* A queue over a handle to a server that answers only what the test lets it answer. */
struct rig {
    struct nbdshim *s;
    int server;
    struct nbdqueue *q;
    struct token token; /* the queue's */
    struct nbdqueue_done done[MAX_DONE];
};

/* Give the queue one more handle. */
void add(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s);

/* Begin a rig. */
void set_up(struct rig *rig, unsigned depth, uint32_t piece);

/* The same over a handle of the caller's, whose server answers by itself. */
void set_up_with(struct rig *rig, struct nbdshim *s, unsigned depth, uint32_t piece);

/* End it, and the handle with it. */
void tear_down(struct rig *rig);

/* Add a request. */
void submit(struct rig *rig, enum nbdqueue_operation operation, uintptr_t token, uint64_t length,
            uint64_t offset);

/* Wait for `count` requests, and take them. */
void finish(struct rig *rig, int count);

/* Whether `count` requests were told of with the tokens from 1 on, each once, and without error. */
bool each_ended_once(const struct rig *rig, int count);

#endif
