// SPDX-License-Identifier: LGPL-2.0-or-later
/* A test program is a table of functions, named by what they prove, and a call of run_tests. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stddef.h>

struct test {
    const char *name;
    void (*run)(void);
};

#define TEST(function) ((struct test){#function, function})

/* Fail the running test and print the line, unless the condition holds. */
#define CHECK(condition) check(condition, __FILE__, __LINE__, #condition)

/* Likewise, and return from the test: for conditions without which it cannot continue. */
#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!CHECK(condition))                                                                     \
            return;                                                                                \
    } while (0)

bool check(bool held, const char *file, int line, const char *condition);

/* Name the subject that failures are about, for tests that loop over a list; NULL for none. */
void checking(const char *subject);

/* Run the tests, print `ok NAME` or `not ok NAME` for each, and return main's exit status. */
int run_tests(const struct test *tests, size_t count);

#define RUN_TESTS(...)                                                                             \
    int main(void)                                                                                 \
    {                                                                                              \
        const struct test tests[] = {__VA_ARGS__};                                                 \
        return run_tests(tests, sizeof tests / sizeof tests[0]);                                   \
    }

#endif
