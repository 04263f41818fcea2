// SPDX-License-Identifier: LGPL-2.0-or-later
#include "check.h"
#include "tokens.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* A test that takes longer than this hangs, and SIGALRM ends the program.  Valgrind is slow. */
#define MAX_TEST_SECONDS 120

static bool failed;
static const char *subject;

bool check(bool held, const char *file, int line, const char *condition)
{
    if (held)
        return true;
    failed = true;
    printf("# %s:%d: not true%s%s: %s\n", file, line, subject ? " for " : "",
           subject ? subject : "", condition);
    return false;
}

void checking(const char *name)
{
    subject = name;
}

int run_tests(const struct test *tests, size_t count)
{
    int status = EXIT_SUCCESS;

    /* Flush each line, so that a crash loses no results and forked children repeat none. */
    setvbuf(stdout, NULL, _IOLBF, 0);
    register_tokens();
    for (size_t i = 0; i < count; i++) {
        failed = false;
        subject = NULL;
        alarm(MAX_TEST_SECONDS);
        tests[i].run();
        alarm(0);
        printf("%s %s\n", failed ? "not ok" : "ok", tests[i].name);
        if (failed)
            status = EXIT_FAILURE;
    }
    return status;
}
