// Checks that abort with their place, and a list of tests of which each has a minute: one that hangs fails.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace fastdiff_test {

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    std::abort();
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
    if (!(a == b)) fail(file, line, std::string(text) + ": " + std::to_string(a) + " != " + std::to_string(b));
}
inline void check_equal(const std::string& a, const std::string& b, const char* text, const char* file, int line) {
    if (a != b) fail(file, line, std::string(text) + ": '" + a + "' != '" + b + "'");
}

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

struct Registered {
    Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

constexpr unsigned kTestSeconds = 60;

// Runs the tests whose names hold `part`. SIGALRM, which nobody handles, ends the process at once.
inline int run_tests(const char* part) {
    int n = 0;
    for (const Test& test : tests()) {
        if (std::string(test.name).find(part) == std::string::npos) continue;
        std::printf("%s\n", test.name);
        std::fflush(stdout);
        ::alarm(kTestSeconds);
        test.run();
        ::alarm(0);
        ++n;
    }
    std::printf("%d passed\n", n);
    return n == 0;
}

}  // namespace fastdiff_test

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) ::fastdiff_test::fail(__FILE__, __LINE__, "CHECK(" #condition ")");    \
    } while (false)
#define CHECK_EQUAL(a, b) ::fastdiff_test::check_equal(a, b, #a " == " #b, __FILE__, __LINE__)
#define CHECK_THROWS(type, ...)                                                                  \
    do {                                                                                         \
        bool thrown_ = false;                                                                    \
        try {                                                                                    \
            __VA_ARGS__;                                                                         \
        } catch (const type&) {                                                                  \
            thrown_ = true;                                                                      \
        }                                                                                        \
        if (!thrown_) ::fastdiff_test::fail(__FILE__, __LINE__, "no " #type " from " #__VA_ARGS__); \
    } while (false)
#define TEST(name)                                                         \
    static void name();                                                    \
    static const ::fastdiff_test::Registered name##_registered(#name, name); \
    static void name()
