// SPDX-License-Identifier: LGPL-2.0-or-later
#include "server.h"
#include "check.h"

#include <endian.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <libnbd.h>

#define NBDKIT "nbdkit", "-s", "--exit-with-parent", "memory", "1M"

#define TIMEOUT_MS 60000

static struct nbdshim *connect_nbdkit(bool opt_mode)
{
    char *argv[] = {NBDKIT, NULL};
    struct nbdshim *s = nbdshim_create();

    CHECK(s != NULL);
    CHECK(nbdcall_add_meta_context(s, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0);
    CHECK(nbdcall_set_opt_mode(s, opt_mode) == 0);
    CHECK(nbdcall_connect_command(s, argv) == 0);
    return s;
}

struct nbdshim *connected(void)
{
    return connect_nbdkit(false);
}

struct nbdshim *connected_to_blocks(void)
{
    char *argv[] = {"nbdkit", "-s", "--exit-with-parent",     "--filter=blocksize-policy",
                    "memory", "1M", "blocksize-minimum=4096", "blocksize-error-policy=error",
                    NULL};
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdcall_connect_command(s, argv) == 0);
    return s;
}

struct nbdshim *negotiating(void)
{
    return connect_nbdkit(true);
}

pid_t connect_to_child(struct nbdshim *s)
{
    int ends[2];
    pid_t server;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    server = fork();
    if (server == 0) {
        dup2(ends[1], STDIN_FILENO);
        dup2(ends[1], STDOUT_FILENO);
        execlp("nbdkit", NBDKIT, (char *)NULL);
        _exit(127);
    }
    CHECK(server > 0);
    close(ends[1]);
    CHECK(nbdcall_connect_socket(s, ends[0]) == 0);
    return server;
}

void kill_server(pid_t server)
{
    CHECK(kill(server, SIGKILL) == 0);
    CHECK(waitpid(server, NULL, 0) == server);
}

int connect_to_silence(struct nbdshim *s, uint64_t size)
{
    return connect_with_flags(s, size, 1);
}

int connect_with_flags(struct nbdshim *s, uint64_t size, uint8_t transmission)
{
    const uint64_t numbers[] = {htobe64(0x4e42444d41474943), htobe64(0x420281861253),
                                htobe64(size)};
    const char flags[4 + 124] = {0, 0, 0, (char)transmission};
    int ends[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK(write(ends[1], numbers, sizeof numbers) == sizeof numbers);
    CHECK(write(ends[1], flags, sizeof flags) == sizeof flags);
    CHECK(nbdcall_connect_socket(s, ends[0]) == 0);
    return ends[1];
}

struct command receive_command(int server)
{
    struct {
        uint32_t magic;
        uint16_t flags, type;
        uint64_t cookie, offset;
        uint32_t size;
    } __attribute__((packed)) wire = {0};

    CHECK(recv(server, &wire, sizeof wire, MSG_WAITALL) == sizeof wire);
    return (struct command){.flags = be16toh(wire.flags),
                            .type = be16toh(wire.type),
                            .cookie = wire.cookie,
                            .offset = be64toh(wire.offset),
                            .size = be32toh(wire.size)};
}

void answer(int server, struct command command, uint32_t error, const void *data, size_t size)
{
    struct {
        uint32_t magic, error;
        uint64_t cookie;
    } __attribute__((packed)) wire = {htobe32(0x67446698), htobe32(error), command.cookie};

    CHECK(send(server, &wire, sizeof wire, 0) == sizeof wire);
    CHECK(send(server, data, size, 0) == (ssize_t)size);
}

int64_t start_read(struct nbdshim *s, void *buf, size_t count, uint64_t offset, uintptr_t token,
                   bool is_called)
{
    int state = NBDSHIM_CLEAN;

    return nbdcall_aio_pread(s, buf, count, &state, offset, token, is_called, 0);
}

void drain(struct nbdshim *s)
{
    while (nbdcall_aio_in_flight(s) > 0) {
        if (nbdcall_poll(s, TIMEOUT_MS) <= 0)
            break;
    }
}
