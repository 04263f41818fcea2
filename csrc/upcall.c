// SPDX-License-Identifier: LGPL-2.0-or-later
/* Upcalls, closures and tokens; see upcall.h, and nbdshim.h for the ABI. */

#include "upcall.h"
#include "internal.h"
#include "nbdglue.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* The largest number of tokens that one `release` receives. */
#define MAX_BATCH 64
/* How often nbdshim_holds tries to take the lock before it gives up. */
#define MAX_LOCK_TRIES 100000

struct nbdshim_upcalls nbdshim_up;
static _Atomic(void *) owner_of_upcalls;
static _Atomic(uint64_t) last_token;
_Thread_local struct nbdshim_upcall *nbdshim_current_upcall;
_Thread_local struct nbdshim_closure *nbdshim_released;
atomic_bool nbdshim_is_ending;
atomic_uint nbdshim_forks;
_Thread_local bool nbdshim_ends_here;

/* Runs in the child after every fork. */
static void count_fork(void)
{
    atomic_fetch_add_explicit(&nbdshim_forks, 1, memory_order_relaxed);
}

void nbdshim_register(const struct nbdshim_upcalls *upcalls)
{
    if (nbdshim_up.release == NULL)
        (void)pthread_atfork(NULL, NULL, count_fork);
    nbdshim_up = *upcalls;
}

void *nbdshim_adopt(void *owner)
{
    void *first = NULL;

    return atomic_compare_exchange_strong(&owner_of_upcalls, &first, owner) ? owner : first;
}

uint64_t nbdshim_next_token(void)
{
    return atomic_fetch_add_explicit(&last_token, 1, memory_order_relaxed) + 1;
}

void nbdshim_end_other_threads(void)
{
    nbdshim_ends_here = true;
    atomic_store(&nbdshim_is_ending, true);
}

void nbdshim_end_upcalls(void)
{
    atomic_store(&nbdshim_is_ending, true);
    nbdshim_ends_here = false;
}

void nbdshim_disconnect_child(struct nbdshim *s)
{
    int socket = atomic_load(&s->socket), socket_dup = atomic_load(&s->socket_dup), nothing;
    struct stat ours, its;

    /*
     * The connection may have ended, and its descriptor's number may belong to an unrelated file by
     * now.  The number is still libnbd's if it refers to the same socket as our duplicate.
     */
    if (socket_dup < 0 || fstat(socket_dup, &ours) == -1 || fstat(socket, &its) == -1 ||
        ours.st_dev != its.st_dev || ours.st_ino != its.st_ino)
        return;
    nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (nothing >= 0) {
        (void)dup2(nothing, socket);
        (void)dup2(nothing, socket_dup);
        close(nothing);
    }
}

void nbdshim_closure_hold(struct nbdshim_closure *c)
{
    struct nbdshim *s = c->s;

    pthread_mutex_lock(&s->lock);
    c->next = s->held;
    if (c->next != NULL)
        c->next->previous = c;
    s->held = c;
    pthread_mutex_unlock(&s->lock);
}

/* Remove c from the list of closures that libnbd holds. */
static void unlink_held(struct nbdshim_closure *c)
{
    struct nbdshim *s = c->s;

    pthread_mutex_lock(&s->lock);
    if (c->next != NULL)
        c->next->previous = c->previous;
    if (c->previous != NULL)
        c->previous->next = c->next;
    else
        s->held = c->next;
    pthread_mutex_unlock(&s->lock);
}

int nbdshim_closure_new(struct nbdshim *s, uintptr_t token, const void *buffer,
                        struct nbdshim_command *command, struct nbdshim_closure **closure)
{
    *closure = NULL;
    if (token == 0)
        return 0;
    *closure = malloc(sizeof **closure);
    if (*closure == NULL)
        return NBDSHIM_NO_MEMORY;
    **closure =
        (struct nbdshim_closure){.s = s, .token = token, .buffer = buffer, .command = command};
    nbdshim_closure_hold(*closure);
    return 0;
}

void nbdshim_push_released(struct nbdshim_closure *c)
{
    c->next = nbdshim_released;
    nbdshim_released = c;
}

void nbdshim_closure_free(void *closure)
{
    struct nbdshim_closure *c = closure;

    if (c == NULL)
        return;
    unlink_held(c);
    if (c->released || nbdshim_is_silent())
        free(c);
    else
        nbdshim_push_released(c);
}

void nbdshim_closure_drop(struct nbdshim_closure *closure)
{
    if (closure == NULL)
        return;
    unlink_held(closure);
    free(closure);
}

/* Remove the closures of s from nbdshim_released, as a list that the caller owns. */
static struct nbdshim_closure *take_released(const struct nbdshim *s)
{
    struct nbdshim_closure *taken = NULL, **link = &nbdshim_released;

    while (*link != NULL) {
        struct nbdshim_closure *c = *link;

        if (c->s == s) {
            *link = c->next;
            c->next = taken;
            taken = c;
        } else {
            link = &c->next;
        }
    }
    return taken;
}

/*
 * Make the upcall `release`, and return whether it has taken the tokens.  A signal handler may
 * raise before it does; the exception is reported once, so the next try usually succeeds.
 */
static bool call_release(const uintptr_t *tokens, size_t count)
{
    for (int i = 0; i < NBDSHIM_MAX_TRIES; i++) {
        if (nbdshim_up.release(tokens, count) == 0)
            return true;
    }
    return false;
}

void nbdshim_release_tokens(struct nbdshim *s)
{
    struct nbdshim_closure *list = take_released(s), *next;

    while (list != NULL) {
        uintptr_t tokens[MAX_BATCH];
        size_t count = 0;
        struct nbdshim_closure *c;
        bool taken;

        for (c = list; c != NULL && count < MAX_BATCH; c = c->next)
            tokens[count++] = c->token;
        taken = call_release(tokens, count);
        for (size_t i = 0; i < count; i++, list = next) {
            next = list->next;
            if (taken)
                free(list);
            else
                nbdshim_push_released(list);
        }
    }
}

void nbdshim_discard_released(const struct nbdshim *s)
{
    for (struct nbdshim_closure *c = take_released(s), *next; c != NULL; c = next) {
        next = c->next;
        free(c);
    }
}

bool nbdshim_holds(struct nbdshim *s, uintptr_t token)
{
    const struct nbdshim_closure *c;

    if (s == NULL)
        return false;
    /*
     * In a forked child the lock may be held by a thread of the parent, which does not exist here,
     * so that nobody unlocks it.  The safe answer is that the token is held.
     */
    for (int tries = 0; pthread_mutex_trylock(&s->lock) != 0; tries++) {
        if (tries == MAX_LOCK_TRIES)
            return true;
        sched_yield();
    }
    /* The caller keeps s in place, and the lock keeps the closures in the list alive. */
    c = s->held;
    while (c != NULL && c->token != token)
        c = c->next;
    pthread_mutex_unlock(&s->lock);
    return c != NULL;
}
