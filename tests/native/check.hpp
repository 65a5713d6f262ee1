// A test program in forty lines: TEST("a sentence") { CHECK(...); }
#pragma once

#include <atomic>
#include <cstdio>
#include <cstring>
#include <vector>

namespace check {

struct Test {
    const char * name;
    void (*run)();
};

inline std::vector<Test> & tests() {
    static std::vector<Test> all;
    return all;
}

inline std::atomic<int> failures{0};

inline bool add(const char * name, void (*run)()) {
    tests().push_back({name, run});
    return true;
}

inline void expect(bool holds, const char * text, const char * file, int line) {
    if (!holds && failures.fetch_add(1) < 20) {
        std::printf("  %s:%d: not so: %s\n", file, line, text);
    }
}

// Runs the tests whose name contains argv[1], or all; the exit status is 1 if one failed.
inline int run(int argc, char ** argv) {
    int passed = 0;
    int failed = 0;
    for (const Test & test : tests()) {
        if (argc < 2 || std::strstr(test.name, argv[1])) {
            failures = 0;
            test.run();
            std::printf("%s  %s\n", failures ? "FAIL" : "ok  ", test.name);
            std::fflush(stdout);
            ++(failures ? failed : passed);
        }
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}

}  // namespace check

#define CHECK_JOIN2(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN2(a, b)
#define TEST(name)                                                                                  \
    static void CHECK_JOIN(test_, __LINE__)();                                                      \
    static const bool CHECK_JOIN(added_, __LINE__) = check::add(name, CHECK_JOIN(test_, __LINE__)); \
    static void CHECK_JOIN(test_, __LINE__)()
#define CHECK(...) check::expect(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
