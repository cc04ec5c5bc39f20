/* Counts the file operations of a process below a folder; the Nth kills it, before or half-way, or fails.

       cc -shared -fPIC -O1 -o disk.so disk.c && LD_PRELOAD=./disk.so python ...

   Operations: open, write, rename, link, unlink, mkdir, rmdir, truncate, fsync, copy. Reading an open file is none.
   Linux, 64 bits. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL_BEFORE = -1, KILL_HALF_WAY = -2 }; /* else the number of an error */

static char folder[PATH_MAX];
static long nth;
static int what, for_ever;
static atomic_long count;

/* From now on count operations below `below`; do `how` at operation `number` (never if 0), and at all later ones if `lasts`. */
void disk_arm(const char *below, long number, int how, int lasts) {
    nth = number, what = how, for_ever = lasts, count = 0;
    snprintf(folder, sizeof folder, "%s/", below);
}

long disk_count(void) { return count; }

static void die(void) { kill(getpid(), SIGKILL); }

/* What happens to an operation on this path: 0 is nothing. */
static int fate(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    long now = ++count;
    if (!nth || now < nth || (now > nth && !for_ever)) return 0;
    if (what == KILL_BEFORE) die();
    return what;
}

static int fate_of(int descriptor, const char *name) {
    char link[64], path[2 * PATH_MAX] = "";
    if (!folder[0]) return 0;
    if (name && name[0] == '/') return fate(name);
    snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    if (name) snprintf(path + length, PATH_MAX, "/%s", name);
    return fate(path);
}

/* Whether it fails: a full disk still opens and removes; a permission is asked for by name. */
static int fails(int fated, int allocates, int by_name) {
    if ((fated == ENOSPC && !allocates) || (fated == EACCES && !by_name)) return 0;
    return fated > 0 ? errno = fated : 0;
}

#define REAL(name)                     \
    static __typeof__(name) *real;     \
    if (!real) real = dlsym(RTLD_NEXT, #name)

/* An operation that has no half: it is done, then the process dies. */
#define WHOLE(name, parameters, arguments, descriptor, path, allocates, by_name)\
    int name parameters {                                                       \
        REAL(name);                                                             \
        int fated = fate_of(descriptor, path);                                  \
        if (fails(fated, allocates, by_name)) return -1;                        \
        int result = real arguments;                                            \
        if (fated < 0) die();                                                   \
        return result;                                                          \
    }

/* One that moves `size` bytes: half of them. */
#define HALVED(name, parameters, arguments, descriptor) \
    ssize_t name parameters {                           \
        REAL(name);                                     \
        int fated = fate_of(descriptor, NULL);          \
        if (fails(fated, 1, 0)) return -1;              \
        if (fated < 0) size /= 2;                       \
        ssize_t result = real arguments;                \
        if (fated < 0) die();                           \
        return result;                                  \
    }

WHOLE(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1, 1)
WHOLE(link, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1, 1)
WHOLE(unlink, (const char *path), (path), AT_FDCWD, path, 0, 1)
WHOLE(unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path, 0, 1)
WHOLE(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1, 1)
WHOLE(rmdir, (const char *path), (path), AT_FDCWD, path, 0, 1)
WHOLE(ftruncate64, (int file, off64_t size), (file, size), file, NULL, 1, 0)
WHOLE(fsync, (int file), (file), file, NULL, 1, 0)
WHOLE(fdatasync, (int file), (file), file, NULL, 1, 0)

HALVED(write, (int file, const void *data, size_t size), (file, data, size), file)
HALVED(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at), file)
HALVED(sendfile64, (int to, int from, off64_t *at, size_t size), (to, from, at, size), to)
HALVED(copy_file_range, (int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags),
       (from, a, to, b, size, flags), to)

ssize_t writev(int file, const struct iovec *parts, int size) {
    REAL(writev);
    int fated = fate_of(file, NULL);
    if (fails(fated, 1, 0)) return -1;
    ssize_t result = real(file, parts, fated < 0 ? size / 2 : size);
    if (fated < 0) die();
    return result;
}

size_t fwrite(const void *data, size_t each, size_t size, FILE *file) {
    REAL(fwrite);
    int fated = folder[0] ? fate_of(fileno(file), NULL) : 0;
    if (fails(fated, 1, 0)) return 0;
    size_t result = real(data, each, fated < 0 ? size / 2 : size, file);
    if (fated < 0) fflush(file), die();
    return result;
}

/* Opening has an optional third argument, and is written in four ways. */
#define OPEN(name, parameters, arguments, descriptor)     \
    int name parameters {                                 \
        REAL(name);                                       \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode_t mode = va_arg(rest, mode_t);               \
        va_end(rest);                                     \
        int fated = fate_of(descriptor, path);            \
        if (fails(fated, flags & O_CREAT, 1)) return -1;  \
        int result = real arguments;                      \
        if (fated < 0) die();                             \
        return result;                                    \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
