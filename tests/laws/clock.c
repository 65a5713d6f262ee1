// A clock for tests: what a thread reads can jump, run fast, or stop the thread until it is told to go on.
//
// The library reads std::chrono::steady_clock at each look at a deadline, which is clock_gettime() called through
// libstdc++'s table of imported functions, and for Ctrl-C the coarse clock, through its own table. clock_install() puts
// clocks for tests into those tables. Threads that have not armed a watch read the time as it is, and so does a thread
// that holds the GIL: a watch is for native calls only, and one that stopped its thread with the GIL would stop all
// others.
#define _GNU_SOURCE
#include <elf.h>
#include <link.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if __SIZEOF_POINTER__ == 8
#define SYMBOL_OF(info) ELF64_R_SYM(info)
#else
#define SYMBOL_OF(info) ELF32_R_SYM(info)
#endif

typedef struct {
    long jump_at;      // the reading from which on the clock is `jump_seconds` ahead; 0 for never
    long jump_seconds;
    long step_ns;      // by how much each reading is ahead of the one before
    long stop_at;      // the reading at which the thread stops until `go_on`; 0 for never
    atomic_long readings;
    atomic_int stopped;
    atomic_int go_on;
} watch_t;

int PyGILState_Check(void);

static __thread watch_t * armed;

void clock_arm(watch_t * watch) { armed = watch; }

static void nap(void) {
    const struct timespec some = {0, 200000};
    nanosleep(&some, NULL);
}

static int read_clock(clockid_t id, clockid_t watched, struct timespec * t) {
    watch_t * const watch = armed;
    if (id != watched || !watch || PyGILState_Check()) {
        return clock_gettime(id, t);
    }
    const long n = atomic_fetch_add(&watch->readings, 1) + 1;
    if (n == watch->stop_at) {
        atomic_store(&watch->stopped, 1);
        while (!atomic_load(&watch->go_on)) {
            nap();
        }
    }
    const int code = clock_gettime(id, t);
    const int64_t ahead = t->tv_nsec + (int64_t) watch->step_ns * n;
    t->tv_sec += ahead / 1000000000;
    t->tv_nsec = ahead % 1000000000;
    if (watch->jump_at && n >= watch->jump_at) {
        t->tv_sec += watch->jump_seconds;
    }
    return code;
}

static int fine_clock(clockid_t id, struct timespec * t) { return read_clock(id, CLOCK_MONOTONIC, t); }
static int coarse_clock(clockid_t id, struct timespec * t) { return read_clock(id, CLOCK_MONOTONIC_COARSE, t); }

// Lets the stopped thread go on, and does not return before it has read its clock so many times. Called with the GIL
// held, which it keeps: a thread that wants the GIL between two readings gets no further. 0 if it gave up waiting.
int clock_hold(watch_t * watch, long readings, long most_seconds) {
    struct timespec began, now;
    clock_gettime(CLOCK_MONOTONIC, &began);
    atomic_store(&watch->go_on, 1);
    while (atomic_load(&watch->readings) < readings) {
        nap();
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - began.tv_sec > most_seconds) {
            return 0;
        }
    }
    return 1;
}

static int redirect(const struct dl_phdr_info * object, const char * table, size_t size, const ElfW(Sym) * symbols,
                    const char * names, int (*clock)(clockid_t, struct timespec *)) {
    int n = 0;
    for (const ElfW(Rela) * entry = (const ElfW(Rela) *) table; (const char *) entry < table + size; ++entry) {
        const ElfW(Sym) * const symbol = symbols + SYMBOL_OF(entry->r_info);
        if (SYMBOL_OF(entry->r_info) == 0 || strcmp(names + symbol->st_name, "clock_gettime") != 0) {
            continue;
        }
        void ** const slot = (void **) (object->dlpi_addr + entry->r_offset);
        const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
        void * const start = (void *) ((uintptr_t) slot & ~(page - 1));
        if (mprotect(start, page, PROT_READ | PROT_WRITE) == 0) {
            *slot = (void *) clock;
            ++n;
        }
    }
    return n;
}

static int visit(struct dl_phdr_info * object, size_t size, void * data) {
    (void) size;
    const char * const name = object->dlpi_name;
    const int is_ours = strstr(name, "/_llama.") || strstr(name, "/_cancel.");
    if (!is_ours && !strstr(name, "libstdc++") && !strstr(name, "libc++")) {
        return 0;
    }
    int (*const clock)(clockid_t, struct timespec *) = is_ours ? coarse_clock : fine_clock;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        if (object->dlpi_phdr[i].p_type != PT_DYNAMIC) {
            continue;
        }
        const char *names = NULL, *calls = NULL, *others = NULL;
        const ElfW(Sym) * symbols = NULL;
        size_t n_calls = 0, n_others = 0;
        for (const ElfW(Dyn) * item = (const ElfW(Dyn) *) (object->dlpi_addr + object->dlpi_phdr[i].p_vaddr);
             item->d_tag != DT_NULL; ++item) {
            switch (item->d_tag) {
                case DT_STRTAB: names = (const char *) item->d_un.d_ptr; break;
                case DT_SYMTAB: symbols = (const ElfW(Sym) *) item->d_un.d_ptr; break;
                case DT_JMPREL: calls = (const char *) item->d_un.d_ptr; break;
                case DT_PLTRELSZ: n_calls = item->d_un.d_val; break;
                case DT_RELA: others = (const char *) item->d_un.d_ptr; break;
                case DT_RELASZ: n_others = item->d_un.d_val; break;
            }
        }
        if (names && symbols && calls) {
            *(int *) data += redirect(object, calls, n_calls, symbols, names, clock);
        }
        if (names && symbols && others) {
            *(int *) data += redirect(object, others, n_others, symbols, names, clock);
        }
    }
    return 0;
}

// How many calls now read these clocks.
int clock_install(void) {
    int n = 0;
    dl_iterate_phdr(visit, &n);
    return n;
}
