/* What the compiled kernels share. Private to this extension module. */
#ifndef ELASTIC_RUN_KERNELS_H
#define ELASTIC_RUN_KERNELS_H
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif

enum { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, INT32 = 3, INT64 = 4 };
enum { BLOCK = 1024, BUFFERS_MAX = 16, STEPS_MAX = 4096 };
enum { ALIGN = 64, LOOK_NS = 1000000 };
enum state { DONE = 0, PAUSED = 1, STALE = 2, BROKEN = 2 }; /* how a slice of a stream or a pump ended */

/* Merge two halves into buffer `out`. A half from 0 up is the part of that number, below it is buffer ~half. */
typedef struct {
    int32_t out, left, right;
} step;

/* Return a checked copy, for `free`; NULL: these are no steps over so many parts. */
step *read_steps(const char *bytes, Py_ssize_t nbytes, int parts, int *count);
/* Bytes of an element; 0: no such type. */
size_t itemsize_of(int type);
/* Follow the steps, which end in buffer 0, divide unless by 1, round once, write to `out`. */
void merge(int type, void *out, const char *const *parts, const step *steps, int count, size_t length, double divisor);
/* To one that is not read again soon. */
void copy_around_caches(char *target, const char *source, size_t length);
/* To one that is read again soon and one that is not. */
void copy_twice(char *near, char *away, const char *source, size_t length);

static inline size_t smaller(size_t one, size_t other) { return one < other ? one : other; }

static inline uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline int readable(int fd)
{
    struct pollfd one = {.fd = fd, .events = POLLIN};
    return poll(&one, 1, 0) != 0;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#endif
}
#endif
