/* Bulk arithmetic on memory that several processes share: what torch needs several passes for, in one.
 *
 * Built ahead of time when there is a compiler; without it native.py answers that there is none, and torch's own
 * kernels do the work, with the same bits: sums run in the order given, in the accumulator's type, rounded once.
 * Callers vouch for addresses and lengths; the interpreter's lock is released while a kernel runs.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif

enum { BLOCK = 1024, PARTS_MAX = 1024 };
enum { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, INT32 = 3, INT64 = 4 };

/* Sums block by block: the running total of a block stays in the first-level cache. */
#define DEFINE_SUM(NAME, TYPE)                                                                    \
    VECTORISED static void NAME(TYPE *out, const uint64_t *parts, int count, size_t length)       \
    {                                                                                             \
        for (size_t start = 0; start < length; start += BLOCK) {                                  \
            size_t size = length - start < BLOCK ? length - start : BLOCK;                        \
            TYPE total[BLOCK];                                                                    \
            const TYPE *first = (const TYPE *)(uintptr_t)parts[0] + start;                        \
            const TYPE *second = (const TYPE *)(uintptr_t)parts[1] + start;                       \
            for (size_t i = 0; i < size; i++) total[i] = first[i] + second[i];                    \
            for (int part = 2; part < count; part++) {                                            \
                const TYPE *more = (const TYPE *)(uintptr_t)parts[part] + start;                  \
                for (size_t i = 0; i < size; i++) total[i] += more[i];                            \
            }                                                                                     \
            memcpy(out + start, total, size * sizeof(TYPE));                                      \
        }                                                                                         \
    }

DEFINE_SUM(sum_float32, float)
DEFINE_SUM(sum_float64, double)
DEFINE_SUM(sum_int32, uint32_t) /* unsigned: wraps by definition, with the bits of the signed sum */
DEFINE_SUM(sum_int64, uint64_t)

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

VECTORISED static void sum_bfloat16(uint16_t *out, const uint64_t *parts, int count, size_t length, float divisor)
{
    for (size_t start = 0; start < length; start += BLOCK) {
        size_t size = length - start < BLOCK ? length - start : BLOCK;
        float total[BLOCK];
        const uint16_t *first = (const uint16_t *)(uintptr_t)parts[0] + start;
        const uint16_t *second = (const uint16_t *)(uintptr_t)parts[1] + start;
        for (size_t i = 0; i < size; i++) total[i] = widen(first[i]) + widen(second[i]);
        for (int part = 2; part < count; part++) {
            const uint16_t *more = (const uint16_t *)(uintptr_t)parts[part] + start;
            for (size_t i = 0; i < size; i++) total[i] += widen(more[i]);
        }
        if (divisor != 1.0f)
            for (size_t i = 0; i < size; i++) total[i] /= divisor;
        for (size_t i = 0; i < size; i++) out[start + i] = round_to_bfloat16(total[i]);
    }
}

/* Writes around the caches: the target is not read again soon, and need not be read before it is overwritten. */
static void copy_around_caches(char *target, const char *source, size_t length)
{
#if defined(__x86_64__)
    size_t head = (16 - ((uintptr_t)target & 15)) & 15;
    if (head > length) head = length;
    memcpy(target, source, head);
    target += head, source += head, length -= head;
    size_t lines = length / 64;
    for (size_t line = 0; line < lines; line++) {
        __m128i a = _mm_loadu_si128((const __m128i *)source), b = _mm_loadu_si128((const __m128i *)(source + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(source + 32)), d = _mm_loadu_si128((const __m128i *)(source + 48));
        _mm_stream_si128((__m128i *)target, a);
        _mm_stream_si128((__m128i *)(target + 16), b);
        _mm_stream_si128((__m128i *)(target + 32), c);
        _mm_stream_si128((__m128i *)(target + 48), d);
        target += 64, source += 64;
    }
    _mm_sfence();
    memcpy(target, source, length - lines * 64);
#else
    memcpy(target, source, length);
#endif
}

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
    uint64_t parts[PARTS_MAX];
    if (!PyArg_ParseTuple(args, "KO!nif", &out, &PyTuple_Type, &addresses, &length, &type, &divisor)) return NULL;
    Py_ssize_t count = PyTuple_Size(addresses);
    if (count < 2 || count > PARTS_MAX || length < 0 || type < FLOAT32 || type > INT64) {
        PyErr_SetString(PyExc_ValueError, "2 to 1024 parts of a known type are summed");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        parts[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(addresses, i));
        if (PyErr_Occurred()) return NULL;
    }
    void *target = (void *)(uintptr_t)out;
    Py_BEGIN_ALLOW_THREADS
    switch (type) {
    case FLOAT32: sum_float32(target, parts, (int)count, (size_t)length); break;
    case FLOAT64: sum_float64(target, parts, (int)count, (size_t)length); break;
    case BFLOAT16: sum_bfloat16(target, parts, (int)count, (size_t)length, divisor); break;
    case INT32: sum_int32(target, parts, (int)count, (size_t)length); break;
    default: sum_int64(target, parts, (int)count, (size_t)length); break;
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy", py_copy, METH_VARARGS, "copy(target, source, nbytes): addresses; writes around the caches"},
    {"sum", py_sum, METH_VARARGS, "sum(out, parts, length, type, divisor): addresses; the divisor is bfloat16's"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
