/* An all-reduce among processes that share memory, as a pipeline of chunks that stay in the caches.
 *
 * Each member has a region: a page of control words, SLOTS chunks of its contribution, SLOTS shares of results. Chunk by
 * chunk it shows its contribution (stage), reduces its share of everybody's (reduce), and takes everybody's results
 * (take); control words count how many chunks it has done of each. A slot is used again when all have read it.
 * What an in-place operation overwrites is kept in `undo`, written around the caches while it is staged anyway.
 * Memory: a member writes only its own region and its own tensors; it reads the other regions, and believes of them
 * nothing but counts: whatever they hold, no address outside of the announced regions is touched. The word GENERATION
 * before a region tells whether it was given away meanwhile; it is looked at after everything that was read.
 * Waiting: a sleeper says so in its own region and sleeps on the other's `ticks` (futex); whoever counts looks who sleeps.
 */
#include "kernels.h"
#include <linux/futex.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MEMBERS_MAX = 1024, CONTROL_BYTES = 128, GENERATION_BEFORE = 64, SPINS = 100 };

typedef struct {
    uint32_t ticks, staged, reduced, taken;
    uint8_t pad[48];
    uint32_t asleep, able;
} control;

typedef struct {
    int rank, size, type;
    size_t itemsize, nbytes, chunk, share, chunks, slots, staging_at, results_at;
    const char *source;
    char *target, *undo;
    double divisor;
    int step_count;
    step *steps;
    control *own;
    const control *others[MEMBERS_MAX];
    uint64_t generations[MEMBERS_MAX];
    uint64_t waited_ns[MEMBERS_MAX];
    uint64_t staged, reduced, taken;
    int blamed;
} stream;

static const char *const NAME = "elastic_run.stream";

static size_t chunk_bytes(const stream *s, uint64_t chunk) { return smaller(s->chunk, s->nbytes - chunk * s->chunk); }

/* The bytes of a chunk that a member reduces. */
static void share_of(const stream *s, uint64_t chunk, int rank, size_t *start, size_t *stop)
{
    size_t nbytes = chunk_bytes(s, chunk), share = (nbytes / (size_t)s->size + ALIGN - 1) / ALIGN * ALIGN;
    if (share * (size_t)s->size < nbytes) share += ALIGN;
    *start = smaller(share * (size_t)rank, nbytes);
    *stop = smaller(share * ((size_t)rank + 1), nbytes);
}

static inline int reached(const uint32_t *word, uint64_t count)
{
    return (int32_t)(__atomic_load_n(word, __ATOMIC_SEQ_CST) - (uint32_t)count) >= 0;
}

static int intact(const stream *s)
{
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (int rank = 0; rank < s->size; rank++) {
        const uint64_t *word = (const uint64_t *)(const void *)((const char *)s->others[rank] - GENERATION_BEFORE);
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != s->generations[rank]) return 0;
    }
    return 1;
}

static void count(stream *s, uint32_t *word, uint64_t value)
{
    __atomic_store_n(word, (uint32_t)value, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&s->own->ticks, 1, __ATOMIC_SEQ_CST);
    for (int rank = 0; rank < s->size; rank++)
        if (rank != s->rank && __atomic_load_n(&s->others[rank]->asleep, __ATOMIC_SEQ_CST)) {
            syscall(SYS_futex, &s->own->ticks, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
            return;
        }
}

/* Wait until a member's word has come to `value`, or for so long. */
static void await(stream *s, int rank, const uint32_t *word, uint64_t value, uint64_t limit_ns)
{
    for (int spin = 0; spin < SPINS; spin++) {
        if (reached(word, value)) return;
        relax();
    }
    const control *other = s->others[rank];
    uint64_t begin = now_ns(), end = begin + limit_ns;
    __atomic_store_n(&s->own->asleep, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t ticks = __atomic_load_n(&other->ticks, __ATOMIC_SEQ_CST);
        if (reached(word, value)) break;
        uint64_t now = now_ns();
        if (now >= end) break;
        struct timespec left = {.tv_sec = (time_t)((end - now) / 1000000000u), .tv_nsec = (long)((end - now) % 1000000000u)};
        syscall(SYS_futex, &other->ticks, FUTEX_WAIT, ticks, &left, NULL, 0);
        if (!intact(s)) break;
    }
    __atomic_store_n(&s->own->asleep, 0, __ATOMIC_SEQ_CST);
    s->waited_ns[rank] += now_ns() - begin;
}

static const char *staging(const stream *s, int rank, uint64_t chunk)
{
    return (const char *)s->others[rank] + s->staging_at + (chunk % s->slots) * s->chunk;
}

static const char *results(const stream *s, int rank, uint64_t chunk)
{
    return (const char *)s->others[rank] + s->results_at + (chunk % s->slots) * s->share;
}

static void stage(stream *s)
{
    size_t start, stop, nbytes = chunk_bytes(s, s->staged), at = s->staged * s->chunk;
    char *slot = (char *)s->own + s->staging_at + (s->staged % s->slots) * s->chunk;
    const char *source = s->source + at;
    share_of(s, s->staged, s->rank, &start, &stop);
    if (s->undo != NULL) {
        char *undo = s->undo + at;
        copy_twice(slot, undo, source, start);
        copy_around_caches(undo + start, source + start, stop - start); /* the own share is reduced where it is */
        copy_twice(slot + stop, undo + stop, source + stop, nbytes - stop);
    } else {
        memcpy(slot, source, start);
        memcpy(slot + stop, source + stop, nbytes - stop);
    }
    count(s, &s->own->staged, ++s->staged);
}

static void reduce(stream *s)
{
    const char *parts[MEMBERS_MAX];
    size_t start, stop;
    share_of(s, s->reduced, s->rank, &start, &stop);
    for (int rank = 0; rank < s->size; rank++)
        parts[rank] = (rank == s->rank ? s->source + s->reduced * s->chunk : staging(s, rank, s->reduced)) + start;
    char *out = (char *)s->own + s->results_at + (s->reduced % s->slots) * s->share;
    merge(s->type, out, parts, s->steps, s->step_count, (stop - start) / s->itemsize, s->divisor);
    count(s, &s->own->reduced, ++s->reduced);
}

static void take(stream *s)
{
    char *target = s->target + s->taken * s->chunk;
    for (int step = 0; step < s->size; step++) {
        int rank = (s->rank + step) % s->size; /* not everybody reads from the same */
        size_t start, stop;
        share_of(s, s->taken, rank, &start, &stop);
        memcpy(target + start, results(s, rank, s->taken), stop - start);
    }
    count(s, &s->own->taken, ++s->taken);
}

enum { STAGED, REDUCED, TAKEN };

/* The first member whose word is not there yet; -1: all are. */
static int late(const stream *s, int which, uint64_t value)
{
    for (int step = 1; step < s->size; step++) {
        int rank = (s->rank + step) % s->size;
        const uint32_t *word = &s->others[rank]->staged + which;
        if (!reached(word, value)) return rank;
    }
    return -1;
}

/* Until the end, until `fd` is readable, or for so long. */
static enum state advance(stream *s, int fd, uint64_t limit_ns)
{
    uint64_t begin = now_ns(), looked = begin;
    for (;;) {
        int rank = -1, which = REDUCED;
        uint64_t value = 0;
        if (s->taken == s->chunks) return intact(s) ? DONE : STALE;
        if (s->reduced < s->staged) {
            rank = late(s, which = STAGED, value = s->reduced + 1);
            if (rank < 0 && s->reduced >= s->slots) rank = late(s, which = TAKEN, value = s->reduced + 1 - s->slots);
            if (rank < 0) {
                reduce(s);
                goto next;
            }
        }
        int slow = s->taken < s->reduced ? late(s, REDUCED, s->taken + 1) : -1;
        if (s->taken < s->reduced && slow < 0) {
            take(s);
            goto next;
        }
        /* No further ahead than slots: so a slot of this member's was read by all that had to before it is written. */
        if (s->staged < s->chunks && s->staged < s->taken + s->slots) {
            int reader = s->staged < s->slots ? -1 : late(s, REDUCED, s->staged + 1 - s->slots);
            if (reader < 0) {
                stage(s);
                goto next;
            }
            /* Only counts that go back, as of memory that was given away, leave nothing else to wait for. */
            if (rank < 0) rank = reader, which = REDUCED, value = s->staged + 1 - s->slots;
        }
        if (slow >= 0 && (rank < 0 || s->staged == s->chunks)) rank = slow, which = REDUCED, value = s->taken + 1;
        s->blamed = rank;
        await(s, rank, &s->others[rank]->staged + which, value, smaller(LOOK_NS, limit_ns));
    next:
        if (!intact(s)) return STALE;
        uint64_t now = now_ns();
        if (now - begin > limit_ns) return PAUSED;
        if (now - looked > LOOK_NS) {
            if (readable(fd)) return PAUSED;
            looked = now;
        }
    }
}

/* Python ---------------------------------------------------------------------------------------------------------- */

static stream *stream_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, NAME); }

static void free_stream(PyObject *capsule)
{
    stream *s = stream_of(capsule);
    if (s != NULL) free(s->steps);
    free(s);
}

PyObject *py_stream(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long source, target, undo;
    PyObject *regions;
    const char *steps;
    Py_ssize_t nbytes, chunk, slots, header, steps_bytes;
    int rank, type;
    double divisor;
    if (!PyArg_ParseTuple(args, "iO!KKKninnny#d", &rank, &PyTuple_Type, &regions, &source, &target, &undo, &nbytes, &type,
                          &chunk, &slots, &header, &steps, &steps_bytes, &divisor))
        return NULL;
    Py_ssize_t size = PyTuple_Size(regions);
    size_t itemsize = itemsize_of(type);
    stream *s = NULL;
    if (size < 2 || size > MEMBERS_MAX || rank < 0 || rank >= size || !itemsize || nbytes < 0 || chunk <= 0 || slots < 2 ||
        header < 0 || chunk % ALIGN || header % ALIGN || nbytes % (Py_ssize_t)itemsize || undo % 16)
        goto wrong;
    s = calloc(1, sizeof *s);
    if (s == NULL) return PyErr_NoMemory();
    s->rank = rank, s->size = (int)size, s->type = type, s->itemsize = itemsize;
    s->nbytes = (size_t)nbytes, s->chunk = (size_t)chunk, s->slots = (size_t)slots;
    s->chunks = (s->nbytes + s->chunk - 1) / s->chunk;
    s->share = (s->chunk / (size_t)size / ALIGN + 2) * ALIGN;
    s->staging_at = CONTROL_BYTES + (size_t)header;
    s->results_at = s->staging_at + s->slots * s->chunk;
    s->source = (const char *)(uintptr_t)source, s->target = (char *)(uintptr_t)target, s->undo = (char *)(uintptr_t)undo;
    s->divisor = divisor, s->blamed = (rank + 1) % (int)size;
    s->steps = read_steps(steps, steps_bytes, s->size, &s->step_count);
    if (s->steps == NULL) goto wrong;
    for (int i = 0; i < s->size; i++) {
        PyObject *pair = PyTuple_GetItem(regions, i);
        unsigned long long address, generation;
        if (!PyArg_ParseTuple(pair, "KK", &address, &generation)) goto failed;
        s->others[i] = (const control *)(uintptr_t)address, s->generations[i] = generation;
    }
    s->own = (control *)(uintptr_t)s->others[rank];
    PyObject *capsule = PyCapsule_New(s, NAME, free_stream);
    if (capsule == NULL) goto failed;
    return capsule;
wrong:
    PyErr_SetString(PyExc_ValueError, "no such stream: 2 to 1024 regions, a known type, whole lines are expected");
failed:
    if (s != NULL) free(s->steps);
    free(s);
    return NULL;
}

PyObject *py_prepare(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long region;
    if (!PyArg_ParseTuple(args, "K", &region)) return NULL;
    control *own = (control *)(uintptr_t)region;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the new generation is seen before what follows */
    memset(own, 0, CONTROL_BYTES);
    __atomic_store_n(&own->able, 1, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

PyObject *py_able(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long region;
    if (!PyArg_ParseTuple(args, "K", &region)) return NULL;
    const control *other = (const control *)(uintptr_t)region;
    return PyBool_FromLong(__atomic_load_n(&other->able, __ATOMIC_SEQ_CST) == 1);
}

PyObject *py_advance(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule;
    int fd;
    unsigned long long limit_ns;
    if (!PyArg_ParseTuple(args, "OiK", &capsule, &fd, &limit_ns)) return NULL;
    stream *s = stream_of(capsule);
    if (s == NULL) return NULL;
    enum state state;
    Py_BEGIN_ALLOW_THREADS
    state = advance(s, fd, limit_ns);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(state);
}

PyObject *py_progress(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule;
    int rank;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &rank)) return NULL;
    stream *s = stream_of(capsule);
    if (s == NULL) return NULL;
    if (rank < 0 || rank >= s->size) {
        PyErr_SetString(PyExc_ValueError, "no such rank");
        return NULL;
    }
    unsigned long long staged = smaller(s->staged * s->chunk, s->nbytes), taken = smaller(s->taken * s->chunk, s->nbytes);
    int finished = rank == s->rank || reached(&s->others[rank]->reduced, s->chunks);
    return Py_BuildValue("KKKii", staged, taken, (unsigned long long)s->waited_ns[rank], finished, s->blamed);
}

PyObject *py_restore(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O", &capsule)) return NULL;
    stream *s = stream_of(capsule);
    if (s == NULL) return NULL;
    if (s->undo != NULL) {
        /* One chunk more than was counted: it may be half taken. */
        size_t nbytes = smaller(smaller(s->taken + 1, s->staged) * s->chunk, s->nbytes);
        Py_BEGIN_ALLOW_THREADS
        memcpy(s->target, s->undo, nbytes);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}
