/* Makes each flush of a file take so many microseconds longer, in whichever program this is
 * preloaded into. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <time.h>

static int later(int result) {
    int error = errno;
    struct timespec left = {DELAY / 1000000, DELAY % 1000000 * 1000L};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
    errno = error;
    return result;
}

int fdatasync(int file) {
    int (*flush)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return later(flush(file));
}

int fsync(int file) {
    int (*flush)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return later(flush(file));
}
