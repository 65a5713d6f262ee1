// Notes the longest times between two readings of the clock on the thread that asked for it, in CPU time: a decode under a
// deadline reads the clock whenever it looks at its token. Loaded before the C library; see gaps.py.
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { KEPT = 3 };

static __thread int noting;
static __thread double last, longest[KEPT];

static double cpu_ms(void) {
    struct timespec t;
    syscall(SYS_clock_gettime, CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

static void note(void) {
    const double now = cpu_ms();
    double gap = now - last;
    last = now;
    for (int i = 0; i < KEPT; ++i) {
        if (gap > longest[i]) {
            const double shorter = longest[i];
            longest[i] = gap;
            gap = shorter;
        }
    }
}

int clock_gettime(clockid_t clock, struct timespec * to) {
    if (noting && clock == CLOCK_MONOTONIC) {
        note();
    }
    return syscall(SYS_clock_gettime, clock, to);
}

void gaps_begin(void) {
    for (int i = 0; i < KEPT; ++i) {
        longest[i] = 0;
    }
    last = cpu_ms();
    noting = 1;
}

// The third longest, in milliseconds: what a model does for long it does in every layer.
double gaps_end(void) {
    noting = 0;
    return longest[KEPT - 1];
}
