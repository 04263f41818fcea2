// SPDX-License-Identifier: LGPL-2.0-or-later
/* A queue for a test, with a handle and a server. */
#ifndef RIG_H
#define RIG_H

#include "handle.h"
#include "queue.h"
#include "tokens.h"
#include "server.h"

#define SIZE 4096
#define MAX_DONE 16
#define NO_TIMEOUT (-1.0)

/* The buffer of all requests: a request uses the bytes at its offset on the disk. */
extern char image[DISK_SIZE];

/* A queue with one handle, connected to a server that replies only when the test makes it. */
struct rig {
    struct nbdshim *s;
    int server;
    struct nbdqueue *q;
    struct token token; /* of the queue */
    struct nbdqueue_done done[MAX_DONE];
};

/* Add a handle to a side of the queue. */
void add(struct nbdqueue *q, enum nbdqueue_side side, struct nbdshim *s);

/* Set up a rig with a handle and a silent server. */
void set_up(struct rig *rig, unsigned depth, uint32_t piece);

/* Set up a rig with the caller's handle, whose server replies by itself. */
void set_up_with(struct rig *rig, struct nbdshim *s, unsigned depth, uint32_t piece);

/* Destroy the queue and the handle. */
void tear_down(struct rig *rig);

/* Submit a request. */
void submit(struct rig *rig, enum nbdqueue_operation operation, uintptr_t token, uint64_t length,
            uint64_t offset);

/* Wait for `count` requests, and take them. */
void finish(struct rig *rig, int count);

/* Whether the tokens 1 to `count` were reported, each once and without an error. */
bool each_ended_once(const struct rig *rig, int count);

#endif
