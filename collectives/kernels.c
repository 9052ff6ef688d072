/* Bulk arithmetic on memory that several processes share: what torch needs several passes for, in one.
 *
 * Built ahead of time when there is a compiler; without it native.py answers that there is none, and torch's own
 * kernels do the work, with the same bits: sums run in the order given, in the accumulator's type, rounded once.
 * Callers vouch for addresses and lengths; the interpreter's lock is released while a kernel runs.
 */
#include "kernels.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { PARTS_MAX = 1024, LINE = 64 };

PyObject *py_stream(PyObject *module, PyObject *args);
PyObject *py_prepare(PyObject *module, PyObject *args);
PyObject *py_able(PyObject *module, PyObject *args);
PyObject *py_advance(PyObject *module, PyObject *args);
PyObject *py_progress(PyObject *module, PyObject *args);
PyObject *py_restore(PyObject *module, PyObject *args);
PyObject *py_pump(PyObject *module, PyObject *args);
PyObject *py_pump_advance(PyObject *module, PyObject *args);
PyObject *py_pump_progress(PyObject *module, PyObject *args);
PyObject *py_pump_restore(PyObject *module, PyObject *args);

static inline float widen(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline uint16_t round_to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

/* Follows steps block by block: the buffers of a block stay in the first-level cache. */
#define DEFINE_MERGE(NAME, TYPE, DIVIDE)                                                                  \
    VECTORISED static void NAME(TYPE *out, const char *const *parts, const step *steps, int count,        \
                                size_t length, double divisor)                                            \
    {                                                                                                     \
        TYPE buffers[BUFFERS_MAX][BLOCK];                                                                 \
        TYPE by = (TYPE)divisor;                                                                          \
        for (size_t start = 0; start < length; start += BLOCK) {                                          \
            size_t size = length - start < BLOCK ? length - start : BLOCK;                                \
            for (int i = 0; i < count; i++) {                                                             \
                int l = steps[i].left, r = steps[i].right;                                                \
                const TYPE *left = l >= 0 ? (const TYPE *)(const void *)parts[l] + start : buffers[~l];   \
                const TYPE *right = r >= 0 ? (const TYPE *)(const void *)parts[r] + start : buffers[~r];  \
                TYPE *into = i + 1 < count ? buffers[steps[i].out] : out + start;                         \
                for (size_t k = 0; k < size; k++) into[k] = left[k] + right[k];                           \
            }                                                                                             \
            if (DIVIDE && divisor != 1.0)                                                                 \
                for (size_t k = 0; k < size; k++) out[start + k] /= by;                                   \
        }                                                                                                 \
    }

DEFINE_MERGE(merge_float32, float, 1)
DEFINE_MERGE(merge_float64, double, 1)
DEFINE_MERGE(merge_int32, uint32_t, 0)
DEFINE_MERGE(merge_int64, uint64_t, 0)

static inline const float *widened(const char *const *parts, int half, size_t start, size_t size,
                                   float buffers[][BLOCK], float *scratch)
{
    if (half < 0) return buffers[~half];
    const uint16_t *part = (const uint16_t *)(const void *)parts[half] + start;
    for (size_t k = 0; k < size; k++) scratch[k] = widen(part[k]);
    return scratch;
}

VECTORISED static void merge_bfloat16(uint16_t *out, const char *const *parts, const step *steps, int count,
                                      size_t length, double divisor)
{
    float buffers[BUFFERS_MAX][BLOCK], one[BLOCK], other[BLOCK], by = (float)divisor;
    for (size_t start = 0; start < length; start += BLOCK) {
        size_t size = length - start < BLOCK ? length - start : BLOCK;
        for (int i = 0; i < count; i++) {
            const float *left = widened(parts, steps[i].left, start, size, buffers, one);
            const float *right = widened(parts, steps[i].right, start, size, buffers, other);
            float *into = buffers[steps[i].out];
            for (size_t k = 0; k < size; k++) into[k] = left[k] + right[k];
        }
        if (divisor != 1.0)
            for (size_t k = 0; k < size; k++) buffers[0][k] /= by;
        for (size_t k = 0; k < size; k++) out[start + k] = round_to_bfloat16(buffers[0][k]);
    }
}

size_t itemsize_of(int type)
{
    switch (type) {
    case FLOAT32: return 4;
    case FLOAT64: return 8;
    case BFLOAT16: return 2;
    case INT32: return 4;
    case INT64: return 8;
    default: return 0;
    }
}

step *read_steps(const char *bytes, Py_ssize_t nbytes, int parts, int *count)
{
    if (nbytes <= 0 || nbytes % (Py_ssize_t)sizeof(step) || nbytes / (Py_ssize_t)sizeof(step) > STEPS_MAX) return NULL;
    step *steps = malloc((size_t)nbytes);
    if (steps == NULL) return NULL;
    memcpy(steps, bytes, (size_t)nbytes);
    *count = (int)(nbytes / (Py_ssize_t)sizeof(step));
    for (int i = 0; i < *count; i++) {
        const step *one = &steps[i];
        if (one->out < 0 || one->out >= BUFFERS_MAX || one->left >= parts || one->right >= parts ||
            ~one->left >= BUFFERS_MAX || ~one->right >= BUFFERS_MAX) {
            free(steps);
            return NULL;
        }
    }
    return steps;
}

void merge(int type, void *out, const char *const *parts, const step *steps, int count, size_t length, double divisor)
{
    switch (type) {
    case FLOAT32: merge_float32(out, parts, steps, count, length, divisor); break;
    case FLOAT64: merge_float64(out, parts, steps, count, length, divisor); break;
    case BFLOAT16: merge_bfloat16(out, parts, steps, count, length, divisor); break;
    case INT32: merge_int32(out, parts, steps, count, length, divisor); break;
    default: merge_int64(out, parts, steps, count, length, divisor); break;
    }
}

/* Lines written around the caches: whole ones at once where the processor can, so that they need not be read before. */
#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void lines_512(char *away, char *near, const char *source, size_t lines)
{
    for (size_t line = 0; line < lines; line++) {
        __m512i whole = _mm512_loadu_si512((const void *)(source + line * LINE));
        if (near != NULL) _mm512_storeu_si512((void *)(near + line * LINE), whole);
        _mm512_stream_si512((__m512i *)(void *)(away + line * LINE), whole);
    }
}

static void lines_128(char *away, char *near, const char *source, size_t lines)
{
    for (size_t line = 0; line < lines; line++)
        for (size_t quarter = line * LINE; quarter < (line + 1) * LINE; quarter += LINE / 4) {
            __m128i part = _mm_loadu_si128((const __m128i *)(const void *)(source + quarter));
            if (near != NULL) _mm_storeu_si128((__m128i *)(void *)(near + quarter), part);
            _mm_stream_si128((__m128i *)(void *)(away + quarter), part);
        }
}
#endif

/* Copy to `away` around the caches, and to `near` through them if it is not NULL. */
static void copy_lines(char *away, char *near, const char *source, size_t length)
{
#if defined(__x86_64__)
    size_t head = (LINE - ((uintptr_t)away & (LINE - 1))) & (LINE - 1);
    if (head > length) head = length;
    memcpy(away, source, head);
    if (near != NULL) memcpy(near, source, head), near += head;
    away += head, source += head, length -= head;
    size_t lines = length / LINE;
    (__builtin_cpu_supports("avx512f") ? lines_512 : lines_128)(away, near, source, lines);
    _mm_sfence();
    away += lines * LINE, source += lines * LINE, length -= lines * LINE;
    if (near != NULL) near += lines * LINE;
#endif
    memcpy(away, source, length);
    if (near != NULL) memcpy(near, source, length);
}

void copy_around_caches(char *target, const char *source, size_t length) { copy_lines(target, NULL, source, length); }

void copy_twice(char *near, char *away, const char *source, size_t length) { copy_lines(away, near, source, length); }

static PyObject *py_copy(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long target, source;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTuple(args, "KKn", &target, &source, &nbytes)) return NULL;
    if (nbytes < 0) {
        PyErr_SetString(PyExc_ValueError, "a negative length");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    copy_around_caches((char *)(uintptr_t)target, (const char *)(uintptr_t)source, (size_t)nbytes);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_sum(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long out;
    PyObject *addresses;
    Py_ssize_t length;
    int type;
    float divisor;
    const char *parts[PARTS_MAX];
    step steps[PARTS_MAX];
    if (!PyArg_ParseTuple(args, "KO!nif", &out, &PyTuple_Type, &addresses, &length, &type, &divisor)) return NULL;
    Py_ssize_t count = PyTuple_Size(addresses);
    if (count < 2 || count > PARTS_MAX || length < 0 || type < FLOAT32 || type > INT64) {
        PyErr_SetString(PyExc_ValueError, "2 to 1024 parts of a known type are summed");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        parts[i] = (const char *)(uintptr_t)PyLong_AsUnsignedLongLong(PyTuple_GetItem(addresses, i));
        if (PyErr_Occurred()) return NULL;
        if (i > 0) steps[i - 1] = (step){.out = 0, .left = i > 1 ? ~0 : 0, .right = (int32_t)i};
    }
    void *target = (void *)(uintptr_t)out;
    Py_BEGIN_ALLOW_THREADS
    merge(type, target, parts, steps, (int)count - 1, (size_t)length, (double)divisor);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy", py_copy, METH_VARARGS, "copy(target, source, nbytes): addresses; writes around the caches"},
    {"sum", py_sum, METH_VARARGS, "sum(out, parts, length, type, divisor): addresses; the divisor is bfloat16's"},
    {"stream", py_stream, METH_VARARGS, "stream(rank, regions, source, target, undo, nbytes, type, chunk, slots, ...)"},
    {"prepare", py_prepare, METH_VARARGS, "prepare(region): reset the control words of an own region"},
    {"able", py_able, METH_VARARGS, "able(region): whether its owner prepared it"},
    {"advance", py_advance, METH_VARARGS, "advance(stream, fd, limit_ns): state"},
    {"progress", py_progress, METH_VARARGS, "progress(stream, rank): staged, taken, waited_ns, finished, blamed"},
    {"pump", py_pump, METH_VARARGS, "pump(rank, descriptors, source, target, undo, nbytes, type, piece, window, ...)"},
    {"pump_advance", py_pump_advance, METH_VARARGS, "pump_advance(pump, fd, limit_ns): state, rank"},
    {"pump_progress", py_pump_progress, METH_VARARGS, "pump_progress(pump, rank): bytes, blocked, over; out and in"},
    {"pump_restore", py_pump_restore, METH_VARARGS, "pump_restore(pump): put back what was overwritten"},
    {"restore", py_restore, METH_VARARGS, "restore(stream): put back what was overwritten"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
