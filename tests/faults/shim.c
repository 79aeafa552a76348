/* Records what a process has synced, so that a test can cut its files back to that: a power cut.

   Loaded by LD_PRELOAD. One line per event is appended to $FAULT_LOG, of files below $FAULT_ROOT only:

     S <dev> <ino> <size>            a file was synced; its size before the call
     D <n> <path>                    a folder was synced: covers the names changed before number n
     C <n> <path>                    a name was made (file or folder)
     R <n> <old>\t<new>\t<kept>      a file was renamed; what had the name is kept at <kept> ("-": nothing)
     U <n> <path>\t<kept>            a name was removed; the file is kept at <kept>

   What is removed or replaced gets another name in $FAULT_KEEP first. While $FAULT_LIE exists as a
   file, syncs do nothing and are not recorded: the control. $FAULT_DIE_AT=n kills the process in the place
   of its n-th sync. $FAULT_EIO as a file: syncs fail with EIO. $FAULT_SLOW as a file: each sync first
   takes as many milliseconds as stand in it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *root, *keep, *lie, *eio, *slow;
static size_t root_length;
static int log_fd = -1;
static long die_at;
static atomic_long n_names, n_syncs, n_kept;

static int (*real_open)(const char *, int, ...);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_rename)(const char *, const char *);
static int (*real_unlink)(const char *);
static int (*real_mkdir)(const char *, mode_t);

__attribute__((constructor)) static void start(void) {
    real_open = dlsym(RTLD_NEXT, "open");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_rename = dlsym(RTLD_NEXT, "rename");
    real_unlink = dlsym(RTLD_NEXT, "unlink");
    real_mkdir = dlsym(RTLD_NEXT, "mkdir");
    const char *log = getenv("FAULT_LOG"), *at = getenv("FAULT_DIE_AT");
    root = getenv("FAULT_ROOT");
    keep = getenv("FAULT_KEEP");
    lie = getenv("FAULT_LIE");
    eio = getenv("FAULT_EIO");
    slow = getenv("FAULT_SLOW");
    die_at = at ? atol(at) : 0;
    if (log && root && keep) {
        root_length = strlen(root);
        log_fd = real_open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    }
}

static int is_ours(const char *path) {
    return log_fd >= 0 && path && strncmp(path, root, root_length) == 0;
}

static void note(const char *format, ...) {
    char line[3 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    int before = errno;
    if (write(log_fd, line, length) != length) abort();
    errno = before;
}

/* Give what has this name another name as well; "-" if nothing has it. */
static void keep_file(const char *path, char *kept) {
    snprintf(kept, PATH_MAX, "%s/%d-%ld", keep, (int)getpid(), atomic_fetch_add(&n_kept, 1));
    if (link(path, kept) != 0) strcpy(kept, "-");
}

static void wait_as_told(void) {
    char text[32] = "";
    int fd = slow ? real_open(slow, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    long ms = read(fd, text, sizeof text - 1) > 0 ? atol(text) : 0;
    close(fd);
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

static int sync_fd(int fd, int (*real)(int)) {
    char link_path[64], path[PATH_MAX];
    snprintf(link_path, sizeof link_path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link_path, path, sizeof path - 1);
    if (length < 0) return real(fd);
    path[length] = 0;
    if (!is_ours(path)) return real(fd);
    if (die_at && atomic_fetch_add(&n_syncs, 1) + 1 == die_at) kill(getpid(), SIGKILL);
    if (lie && access(lie, F_OK) == 0) return 0;
    if (eio && access(eio, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    wait_as_told();
    struct stat found;
    if (fstat(fd, &found) != 0) return real(fd);
    long n = atomic_load(&n_names);
    int status = real(fd);
    if (status == 0) {
        if (S_ISDIR(found.st_mode))
            note("D %ld %s\n", n, path);
        else
            note("S %lu %lu %lld\n", (unsigned long)found.st_dev, (unsigned long)found.st_ino,
                 (long long)found.st_size);
    }
    return status;
}

int fsync(int fd) { return sync_fd(fd, real_fsync); }
int fdatasync(int fd) { return sync_fd(fd, real_fdatasync); }

static int open_path(const char *path, int flags, mode_t mode) {
    if (!(flags & O_CREAT) || !is_ours(path)) return real_open(path, flags, mode);
    int is_new = access(path, F_OK) != 0;
    int fd = real_open(path, flags, mode);
    if (fd >= 0 && is_new) note("C %ld %s\n", atomic_fetch_add(&n_names, 1), path);
    return fd;
}

#define OPEN(name)                                                 \
    int name(const char *path, int flags, ...) {                   \
        mode_t mode = 0;                                           \
        if (flags & (O_CREAT | O_TMPFILE)) {                       \
            va_list arguments;                                     \
            va_start(arguments, flags);                            \
            mode = va_arg(arguments, mode_t);                      \
            va_end(arguments);                                     \
        }                                                          \
        return open_path(path, flags, mode);                       \
    }
OPEN(open)
OPEN(open64)

int mkdir(const char *path, mode_t mode) {
    int status = real_mkdir(path, mode);
    if (status == 0 && is_ours(path)) note("C %ld %s\n", atomic_fetch_add(&n_names, 1), path);
    return status;
}

int rename(const char *old_path, const char *new_path) {
    if (!is_ours(new_path)) return real_rename(old_path, new_path);
    char kept[PATH_MAX];
    keep_file(new_path, kept);
    int status = real_rename(old_path, new_path);
    if (status == 0)
        note("R %ld %s\t%s\t%s\n", atomic_fetch_add(&n_names, 1), old_path, new_path, kept);
    return status;
}

int unlink(const char *path) {
    if (!is_ours(path)) return real_unlink(path);
    char kept[PATH_MAX];
    keep_file(path, kept);
    int status = real_unlink(path);
    if (status == 0) note("U %ld %s\t%s\n", atomic_fetch_add(&n_names, 1), path, kept);
    return status;
}
