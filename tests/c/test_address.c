// SPDX-License-Identifier: LGPL-2.0-or-later
/* Socket addresses equal those of the system's own functions, byte for byte. */
#include "check.h"
#include "nbdshim.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_PATH (sizeof(((struct sockaddr_un *)0)->sun_path))

static char addr[128];

/* Whether `addr` starts with this address of `size` bytes, and the bytes after it are untouched. */
static bool holds(uint32_t size, const void *address, uint32_t expected)
{
    bool is_equal = size == expected && memcmp(addr, address, size) == 0;

    for (size_t i = size; i < sizeof addr; i++)
        is_equal = is_equal && addr[i] == 'x';
    memset(addr, 'x', sizeof addr);
    return is_equal;
}

/* Get getaddrinfo's first address for a numeric host; returns its size, or 0. */
static uint32_t resolve(const char *host, const char *port, int family, void *address)
{
    const struct addrinfo hints = {.ai_family = family,
                                   .ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    struct addrinfo *found;
    uint32_t size;

    if (getaddrinfo(host, port, &hints, &found) != 0)
        return 0;
    size = found->ai_addrlen;
    memcpy(address, found->ai_addr, size);
    freeaddrinfo(found);
    return size;
}

static uint32_t make_unix(const char *path, size_t length)
{
    memset(addr, 'x', sizeof addr);
    return nbdshim_address_unix(addr, sizeof addr, path, length);
}

static void a_path_ends_with_a_nul_that_counts(void)
{
    const struct sockaddr_un sun = {.sun_family = AF_UNIX, .sun_path = "/run/nbd"};
    uint32_t size = offsetof(struct sockaddr_un, sun_path) + sizeof "/run/nbd";

    CHECK(holds(make_unix("/run/nbd", 8), &sun, size));
}

static void an_abstract_name_has_no_nul_behind_it(void)
{
    const struct sockaddr_un sun = {.sun_family = AF_UNIX, .sun_path = "\0nbd"};
    uint32_t size = offsetof(struct sockaddr_un, sun_path) + 4;

    CHECK(holds(make_unix("\0nbd", 4), &sun, size));
}

/* Bind a socket to the address, and compare with the name that the kernel reports. */
static void the_kernel_reports_an_abstract_name(void)
{
    char name[32], bound[128];
    socklen_t bound_size = sizeof bound;
    int length = snprintf(name, sizeof name, "%cnbdshim-%d", '\0', (int)getpid());
    uint32_t size = make_unix(name, (size_t)length);
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);

    CHECK(bind(sock, (struct sockaddr *)addr, size) == 0);
    CHECK(getsockname(sock, (struct sockaddr *)bound, &bound_size) == 0);
    CHECK(holds(size, bound, bound_size));
    close(sock);
}

static void the_longest_names_fit(void)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};

    memset(sun.sun_path, 'a', MAX_PATH - 1);
    CHECK(holds(make_unix(sun.sun_path, MAX_PATH - 1), &sun, sizeof sun));
    sun.sun_path[MAX_PATH - 1] = 'a';
    sun.sun_path[0] = '\0';
    CHECK(holds(make_unix(sun.sun_path, MAX_PATH), &sun, sizeof sun));
}

static void names_that_are_too_long_are_refused(void)
{
    char name[256];

    memset(name, 'a', sizeof name);
    CHECK(holds(make_unix(name, MAX_PATH), "", 0));
    CHECK(holds(make_unix(name, sizeof name), "", 0));
    CHECK(holds(make_unix(name, SIZE_MAX), "", 0));
    name[0] = '\0';
    CHECK(holds(make_unix(name, MAX_PATH + 1), "", 0));
}

static void an_inet_address_is_getaddrinfos(void)
{
    struct sockaddr_in sin;
    struct in_addr ip;
    uint32_t size = resolve("192.0.2.17", "10809", AF_INET, &sin);

    REQUIRE(size != 0);
    CHECK(inet_pton(AF_INET, "192.0.2.17", &ip) == 1);
    memset(addr, 'x', sizeof addr);
    CHECK(holds(nbdshim_address_inet(addr, sizeof addr, (char *)&ip, 10809), &sin, size));
}

static void an_inet6_address_is_getaddrinfos(void)
{
    struct sockaddr_in6 sin6;
    struct in6_addr ip;
    uint32_t size = resolve("2001:db8::17", "65535", AF_INET6, &sin6);

    REQUIRE(size != 0);
    CHECK(inet_pton(AF_INET6, "2001:db8::17", &ip) == 1);
    memset(addr, 'x', sizeof addr);
    CHECK(holds(nbdshim_address_inet6(addr, sizeof addr, (char *)&ip, 65535, 0, 0), &sin6, size));
}

static void a_scope_is_getaddrinfos(void)
{
    struct sockaddr_in6 sin6;
    struct in6_addr ip;
    uint32_t size = resolve("fe80::1%lo", "10809", AF_INET6, &sin6);

    REQUIRE(size != 0);
    CHECK(inet_pton(AF_INET6, "fe80::1", &ip) == 1);
    memset(addr, 'x', sizeof addr);
    CHECK(
        holds(nbdshim_address_inet6(addr, sizeof addr, (char *)&ip, 10809, 0, if_nametoindex("lo")),
              &sin6, size));
}

static void a_flow_is_in_network_order(void)
{
    struct sockaddr_in6 sin6;
    uint32_t size;

    size = nbdshim_address_inet6(addr, sizeof addr, (char *)&in6addr_loopback, 1, 0x12345, 0);
    CHECK(size == sizeof sin6);
    memcpy(&sin6, addr, sizeof sin6);
    CHECK(sin6.sin6_flowinfo == htonl(0x12345));
    CHECK(memcmp(&sin6.sin6_addr, &in6addr_loopback, sizeof in6addr_loopback) == 0);
}

static void an_address_that_does_not_fit_is_not_written(void)
{
    const char ip[16] = {0};

    memset(addr, 'x', sizeof addr);
    CHECK(holds(nbdshim_address_unix(addr, 4, "/run/nbd", 8), "", 0));
    CHECK(holds(nbdshim_address_inet(addr, sizeof(struct sockaddr_in) - 1, ip, 1), "", 0));
    CHECK(holds(nbdshim_address_inet6(addr, sizeof(struct sockaddr_in6) - 1, ip, 1, 0, 0), "", 0));
}

RUN_TESTS(TEST(a_path_ends_with_a_nul_that_counts), TEST(an_abstract_name_has_no_nul_behind_it),
          TEST(the_kernel_reports_an_abstract_name), TEST(the_longest_names_fit),
          TEST(names_that_are_too_long_are_refused), TEST(an_inet_address_is_getaddrinfos),
          TEST(an_inet6_address_is_getaddrinfos), TEST(a_scope_is_getaddrinfos),
          TEST(a_flow_is_in_network_order), TEST(an_address_that_does_not_fit_is_not_written))
