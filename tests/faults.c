/* A disk that fails, or a process that is killed: at one chosen write, fsync, rename or mkdir below FAULT_ROOT.

   Preloaded into a process (LD_PRELOAD), so that it meets every library's files, whatever that library is written in. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 1, SHORT = 2, SLOW = 3, KILL = 4 };
static atomic_long count, chosen;
static atomic_int how;

/* From now on count from zero; the n-th operation (from 1) fails, or kills the process. n = 0: none does. */
void fault_arm(long n, int mode) { atomic_store(&count, 0); atomic_store(&chosen, n); atomic_store(&how, mode); }
long fault_count(void) { return atomic_load(&count); }

static const char *root(void) { return getenv("FAULT_ROOT"); }

static int below(const char *path) {
    const char *r = root();
    char whole[PATH_MAX];
    if (!r || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, sizeof whole - 1)) return 0;
        return !strncmp(whole, r, strlen(r));
    }
    return !strncmp(path, r, strlen(r));
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    ssize_t n;
    if (!root()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether this operation is the chosen one; a slow one only waits. */
static int hit(void) {
    if (atomic_fetch_add(&count, 1) + 1 != atomic_load(&chosen)) return 0;
    if (atomic_load(&how) == SLOW) { usleep(200000); return 0; }
    if (atomic_load(&how) == KILL) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (fd > 2 && fd_below(fd) && hit()) {
        if (atomic_load(&how) == SHORT && n > 1) real(fd, data, n / 2);
        errno = ENOSPC;
        return -1;
    }
    return real(fd, data, n);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    if (fd_below(fd) && hit()) return -1;
    return real(fd, data, n, at);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (fd_below(fd) && hit()) return -1;
    return real(fd, data, n, at);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (fd > 2 && fd_below(fd) && hit()) return -1;
    return real(fd, parts, n);
}

ssize_t sendfile(int to, int from, off_t *at, size_t n) {
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    if (fd_below(to) && hit()) return -1;
    return real(to, from, at, n);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t n) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    if (fd_below(to) && hit()) return -1;
    return real(to, from, at, n);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    return fd_below(fd) && hit() ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return fd_below(fd) && hit() ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return below(to) && hit() ? -1 : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return below(to) && hit() ? -1 : real(a, from, b, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return below(path) && hit() ? -1 : real(path, mode);
}
