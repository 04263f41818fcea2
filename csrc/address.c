// SPDX-License-Identifier: LGPL-2.0-or-later
/* Build socket addresses for callers that have no structs; see nbdshim.h. */

#include "nbdshim.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

uint32_t nbdshim_address_unix(void *addr, uint32_t capacity, const char *path, size_t length)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    /* A path has a terminating NUL, which counts; an abstract name starts with one instead. */
    size_t nul = length == 0 || path[0] != '\0';
    size_t size = offsetof(struct sockaddr_un, sun_path) + length + nul;

    if (length > sizeof sun.sun_path - nul || sizeof sun > capacity)
        return 0;
    memcpy(sun.sun_path, path, length);
    memcpy(addr, &sun, size);
    return (uint32_t)size;
}

uint32_t nbdshim_address_inet(void *addr, uint32_t capacity, const char *ip, uint16_t port)
{
    struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(port)};

    if (sizeof sin > capacity)
        return 0;
    memcpy(&sin.sin_addr, ip, sizeof sin.sin_addr);
    memcpy(addr, &sin, sizeof sin);
    return sizeof sin;
}

uint32_t nbdshim_address_inet6(void *addr, uint32_t capacity, const char *ip, uint16_t port,
                               uint32_t flow, uint32_t scope)
{
    struct sockaddr_in6 sin6 = {.sin6_family = AF_INET6,
                                .sin6_port = htons(port),
                                .sin6_flowinfo = htonl(flow),
                                .sin6_scope_id = scope};

    if (sizeof sin6 > capacity)
        return 0;
    memcpy(&sin6.sin6_addr, ip, sizeof sin6.sin6_addr);
    memcpy(addr, &sin6, sizeof sin6);
    return sizeof sin6;
}
