// SPDX-License-Identifier: LGPL-2.0-or-later
/* A library to preload: the n-th call of malloc from a chosen shared object fails. */
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <string.h>

static uintptr_t start, end;
static int calls, failing;

int fail_malloc_of(const char *file);
int fail_malloc_at(int n);

static int find(struct dl_phdr_info *info, size_t size, void *file)
{
    (void)size;
    if (strcmp(info->dlpi_name, file) != 0)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            end = start + info->dlpi_phdr[i].p_memsz;
        }
    }
    return 1;
}

/* Choose the shared object.  Returns 1 if it is loaded, else 0. */
int fail_malloc_of(const char *file)
{
    return dl_iterate_phdr(find, (void *)file);
}

/* Make its n-th call from now on fail; 0 for none.  Returns its calls since the last time. */
int fail_malloc_at(int n)
{
    int made = calls;

    calls = 0;
    failing = n;
    return made;
}

/* Whether this call, which returns to the address `caller`, is the one that fails. */
static int fails(uintptr_t caller)
{
    if (start <= caller && caller < end && ++calls == failing) {
        errno = ENOMEM;
        return 1;
    }
    return 0;
}

void *malloc(size_t size)
{
    static void *(*next)(size_t size);

    if (fails((uintptr_t)__builtin_return_address(0)))
        return NULL;
    if (next == NULL)
        *(void **)&next = dlsym(RTLD_NEXT, "malloc");
    return next(size);
}

/* Compilers may turn malloc followed by memset into calloc; gcc 16 does. */
void *calloc(size_t number, size_t size)
{
    static void *(*next)(size_t number, size_t size);
    static int looking;

    if (fails((uintptr_t)__builtin_return_address(0)) || looking)
        return NULL;
    if (next == NULL) {
        looking = 1; /* dlsym may allocate; it copes with a failure */
        *(void **)&next = dlsym(RTLD_NEXT, "calloc");
        looking = 0;
    }
    return next(number, size);
}
