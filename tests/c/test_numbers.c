// SPDX-License-Identifier: LGPL-2.0-or-later
/* The numbers and strings that libnbd returns. */
#include "check.h"
#include "tokens.h"
#include "server.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static int64_t size_of_export(uint64_t size)
{
    struct nbdshim *s = nbdshim_create();
    int server = connect_to_silence(s, size);
    int64_t result = nbdcall_get_size(s);

    nbdshim_destroy(s);
    close(server);
    return result;
}

static void a_size_is_returned_as_it_is(void)
{
    CHECK(size_of_export(0) == 0);
    CHECK(size_of_export(DISK_SIZE) == DISK_SIZE);
    CHECK(size_of_export(INT64_MAX) == INT64_MAX);
}

/* libnbd either returns it as a negative number or fails: it must not look like a refusal. */
static void a_size_beyond_63_bits_is_no_refusal(void)
{
    const uint64_t sizes[] = {(uint64_t)1 << 63, UINT64_MAX - 1, UINT64_MAX - 2, UINT64_MAX - 3};

    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int64_t result = size_of_export(sizes[i]);

        CHECK(result == NBDSHIM_TOO_LARGE || result == -1);
    }
}

static void a_failure_is_minus_1_with_message_and_errno(void)
{
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdcall_set_tls(s, 99) == -1);
    CHECK(nbdshim_errno() == EINVAL);
    CHECK(nbdshim_error() != NULL && strncmp(nbdshim_error(), "nbd_set_tls: ", 13) == 0);
    nbdshim_destroy(s);
}

static void a_refusal_leaves_the_last_error_alone(void)
{
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdcall_set_tls(s, 99) == -1);
    CHECK(nbdshim_close(s) == 0);
    CHECK(nbdcall_get_size(s) == NBDSHIM_CLOSED);
    CHECK(nbdshim_errno() == EINVAL);
    nbdshim_destroy(s);
}

static void the_caller_frees_a_string(void)
{
    struct nbdshim *s = nbdshim_create();
    char *name;

    CHECK(nbdcall_set_handle_name(s, "caf\xc3\xa9 \xff") == 0);
    name = nbdcall_get_handle_name(s);
    nbdshim_destroy(s);
    CHECK(name != NULL && strcmp(name, "caf\xc3\xa9 \xff") == 0);
    nbdshim_free(name);
    nbdshim_free(NULL);
}

static void an_unsigned_flag_word_is_never_negative(void)
{
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdcall_set_strict_mode(s, UINT32_MAX) == 0 || nbdshim_errno() == EINVAL);
    CHECK(nbdcall_get_strict_mode(s) >= 0);
    nbdshim_destroy(s);
}

static void private_data_keeps_every_bit(void)
{
    struct nbdshim *s = nbdshim_create();

    CHECK(nbdcall_set_private_data(s, UINTPTR_MAX) == 0);
    CHECK(nbdcall_set_private_data(s, 1) == UINTPTR_MAX);
    CHECK(nbdcall_get_private_data(s) == 1);
    nbdshim_destroy(s);
}

RUN_TESTS(TEST(a_size_is_returned_as_it_is), TEST(a_size_beyond_63_bits_is_no_refusal),
          TEST(a_failure_is_minus_1_with_message_and_errno),
          TEST(a_refusal_leaves_the_last_error_alone), TEST(the_caller_frees_a_string),
          TEST(an_unsigned_flag_word_is_never_negative), TEST(private_data_keeps_every_bit))
