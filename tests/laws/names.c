// A resolver that never ends, for one name: to be loaded before the C library.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char * name, const char * service, const struct addrinfo * hints, struct addrinfo ** found) {
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (!real) {
        real = dlsym(RTLD_NEXT, "getaddrinfo");
    }
    while (name && strcmp(name, "silent.invalid") == 0 && !(hints && hints->ai_flags & AI_NUMERICHOST)) {
        pause();
    }
    return real(name, service, hints, found);
}
