/* An all-reduce among processes that are connected by byte streams, one each way between any two.
 *
 * Every member owns a share of the elements. On the stream to a peer travel, piece by piece, this member's part of the
 * peer's share and the reduced pieces of its own share, the latter WINDOW pieces late: both sides know the order, so there
 * are no frames. A piece of the own share is reduced when everybody's part of it is there, in the order of the steps.
 * Pieces are small, so that what the kernel has just copied is still in the caches. What an in-place operation overwrites
 * is kept in `undo`, piece by piece before it is sent: the reading for the one is the reading for the other.
 * Memory: whatever peers send, they decide neither addresses nor lengths, only the content of what was asked for.
 */
#include "kernels.h"
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { MEMBERS_MAX = 64, TURN_UNITS = 4 };

/* One direction of one stream: pieces of `parts` of one share and of `results` of another, in the agreed order. */
typedef struct {
    int fd;
    size_t parts, results;    /* pieces in all */
    size_t part, result, off; /* pieces done, bytes of the next one */
    int kept;                 /* of the next one: undo has it */
    uint64_t bytes, blocked_ns;
} way;

typedef struct {
    int rank, size, type, broken, blamed;
    size_t itemsize, nbytes, share, piece, window, slots, reduced, pieces;
    const char *source;
    char *target, *undo, *arrived;
    double divisor;
    step *steps;
    int step_count;
    way in[MEMBERS_MAX], out[MEMBERS_MAX];
} pump;

static const char *const NAME = "elastic_run.pump";

static size_t start_of(const pump *p, int rank) { return smaller(p->share * (size_t)rank, p->nbytes); }

static size_t length_of(const pump *p, int rank) { return start_of(p, rank + 1) - start_of(p, rank); }

static size_t pieces_of(const pump *p, int rank) { return (length_of(p, rank) + p->piece - 1) / p->piece; }

static size_t piece_length(const pump *p, int rank, size_t piece)
{
    return smaller(p->piece, length_of(p, rank) - piece * p->piece);
}

static size_t place_of(const pump *p, int rank, size_t piece) { return start_of(p, rank) + piece * p->piece; }

static int over(const way *w) { return w->part == w->parts && w->result == w->results; }

/* What the next piece is; the same rule at both ends. */
static int is_part(const way *w, size_t window)
{
    return w->part < w->parts && (w->part < w->result + window || w->result == w->results);
}

static void keep(pump *p, size_t place, size_t length)
{
    if (p->undo != NULL) copy_around_caches(p->undo + place, p->source + place, length);
}

static char *arrived(const pump *p, int rank, size_t piece)
{
    return p->arrived + ((size_t)rank * p->slots + piece % p->slots) * p->piece;
}

/* Receive from one peer as far as there is something, and room; 1: something came, 0: not, -1: the stream is broken. */
static int receive(pump *p, int rank, int *waiting)
{
    way *w = &p->in[rank];
    int moved = 0;
    *waiting = 0;
    for (int unit = 0; unit < TURN_UNITS && !over(w); unit++) {
        int part = is_part(w, p->window);
        if (part && w->part >= p->reduced + p->slots) return moved; /* no room: others are late */
        if (!part && w->result >= p->out[rank].part) return moved; /* of what was not sent there, nor kept, yet */
        int owner = part ? p->rank : rank;
        size_t piece = part ? w->part : w->result, length = piece_length(p, owner, piece);
        char *to = part ? arrived(p, rank, piece) : p->target + place_of(p, owner, piece);
        ssize_t got = recv(w->fd, to + w->off, length - w->off, MSG_DONTWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            *waiting = 1;
            return moved;
        }
        if (got <= 0) return -1;
        moved = 1, w->off += (size_t)got, w->bytes += (uint64_t)got;
        if (w->off < length) continue;
        w->off = 0;
        if (part) w->part++;
        else w->result++;
    }
    *waiting = !over(w);
    return moved;
}

static int transmit(pump *p, int rank, int *waiting)
{
    way *w = &p->out[rank];
    int moved = 0;
    *waiting = 0;
    for (int unit = 0; unit < TURN_UNITS && !over(w); unit++) {
        int part = is_part(w, p->window);
        if (!part && w->result >= p->reduced) return moved; /* not reduced yet */
        int owner = part ? rank : p->rank;
        size_t piece = part ? w->part : w->result, length = piece_length(p, owner, piece);
        size_t place = place_of(p, owner, piece);
        const char *from = (part ? p->source : p->target) + place;
        if (part && !w->kept) {
            keep(p, place, length);
            w->kept = 1;
        }
        ssize_t put = send(w->fd, from + w->off, length - w->off, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            *waiting = 1;
            return moved;
        }
        if (put < 0) return -1;
        moved = 1, w->off += (size_t)put, w->bytes += (uint64_t)put;
        if (w->off < length) continue;
        w->off = 0, w->kept = 0;
        if (part) w->part++;
        else w->result++;
    }
    *waiting = !over(w);
    return moved;
}

static int reduce(pump *p)
{
    int moved = 0;
    for (; p->reduced < p->pieces; p->reduced++, moved = 1) {
        const char *parts[MEMBERS_MAX];
        size_t place = place_of(p, p->rank, p->reduced), length = piece_length(p, p->rank, p->reduced);
        for (int rank = 0; rank < p->size; rank++) {
            if (rank != p->rank && p->in[rank].part <= p->reduced) return moved;
            parts[rank] = rank == p->rank ? p->source + place : arrived(p, rank, p->reduced);
        }
        keep(p, place, length);
        merge(p->type, p->target + place, parts, p->steps, p->step_count, length / p->itemsize, p->divisor);
    }
    return moved;
}

/* Until the end, until `fd` is readable, or for so long. */
static enum state advance(pump *p, int fd, uint64_t limit_ns)
{
    uint64_t begin = now_ns(), looked = begin;
    for (;;) {
        struct pollfd fds[1 + 2 * MEMBERS_MAX];
        way *ways[1 + 2 * MEMBERS_MAX];
        nfds_t count = 1;
        int moved = 0, left = 0, waiting;
        size_t least = SIZE_MAX;
        fds[0] = (struct pollfd){.fd = fd, .events = POLLIN};
        for (int step = 1; step < p->size; step++) {
            int rank = (p->rank + step) % p->size, got = receive(p, rank, &waiting);
            if (got < 0) return p->broken = rank, BROKEN;
            moved |= got, left |= !over(&p->in[rank]);
            if (waiting) ways[count] = &p->in[rank], fds[count++] = (struct pollfd){.fd = p->in[rank].fd, .events = POLLIN};
            /* Who is behind: whoever waits for that one sends up to WINDOW pieces more. */
            if (waiting && p->in[rank].part + p->in[rank].result < least) {
                least = p->in[rank].part + p->in[rank].result;
                p->blamed = rank;
            }
        }
        moved |= reduce(p);
        for (int step = 1; step < p->size; step++) {
            int rank = (p->rank - step + p->size) % p->size, put = transmit(p, rank, &waiting);
            if (put < 0) return p->broken = rank, BROKEN;
            moved |= put, left |= !over(&p->out[rank]);
            if (waiting) ways[count] = &p->out[rank], fds[count++] = (struct pollfd){.fd = p->out[rank].fd, .events = POLLOUT};
        }
        if (!left && p->reduced == p->pieces) return DONE;
        uint64_t now = now_ns(), spent = now - begin;
        if (!moved) {
            if (spent >= limit_ns) return PAUSED;
            poll(fds, count, (int)((limit_ns - spent) / 1000000) + 1);
            uint64_t waited = now_ns() - now;
            for (nfds_t i = 1; i < count; i++) ways[i]->blocked_ns += waited;
            if (fds[0].revents) return PAUSED;
        } else if (now - looked > LOOK_NS) {
            if (spent >= limit_ns || readable(fd)) return PAUSED;
            looked = now;
        }
    }
}

/* Python ---------------------------------------------------------------------------------------------------------- */

static void free_pump(PyObject *capsule)
{
    pump *p = PyCapsule_GetPointer(capsule, NAME);
    if (p != NULL) free(p->steps);
    free(p);
}

PyObject *py_pump(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long source, target, undo, memory;
    PyObject *descriptors;
    const char *steps;
    Py_ssize_t nbytes, memory_bytes, piece, window, steps_bytes;
    int rank, type;
    double divisor;
    if (!PyArg_ParseTuple(args, "iO!KKKninnKny#d", &rank, &PyTuple_Type, &descriptors, &source, &target, &undo, &nbytes,
                          &type, &piece, &window, &memory, &memory_bytes, &steps, &steps_bytes, &divisor))
        return NULL;
    Py_ssize_t size = PyTuple_Size(descriptors);
    size_t itemsize = itemsize_of(type);
    pump *p = NULL;
    if (size < 2 || size > MEMBERS_MAX || rank < 0 || rank >= size || !itemsize || nbytes < 0 || piece <= 0 || window < 1 ||
        piece % ALIGN || nbytes % (Py_ssize_t)itemsize || memory_bytes / piece / size < window + 1)
        goto wrong;
    p = calloc(1, sizeof *p);
    if (p == NULL) return PyErr_NoMemory();
    p->rank = rank, p->size = (int)size, p->type = type, p->itemsize = itemsize, p->divisor = divisor;
    p->nbytes = (size_t)nbytes, p->piece = (size_t)piece, p->window = (size_t)window, p->slots = p->window + 1;
    p->share = ((p->nbytes + (size_t)size - 1) / (size_t)size + ALIGN - 1) / ALIGN * ALIGN;
    p->source = (const char *)(uintptr_t)source, p->target = (char *)(uintptr_t)target;
    p->undo = (char *)(uintptr_t)undo, p->arrived = (char *)(uintptr_t)memory;
    p->pieces = pieces_of(p, rank), p->broken = -1, p->blamed = (rank + 1) % (int)size;
    p->steps = read_steps(steps, steps_bytes, (int)size, &p->step_count);
    if (p->steps == NULL) goto wrong;
    for (int i = 0; i < p->size; i++) {
        if (!PyArg_ParseTuple(PyTuple_GetItem(descriptors, i), "ii", &p->in[i].fd, &p->out[i].fd)) goto failed;
        if (i == rank) continue;
        p->in[i].parts = pieces_of(p, rank), p->in[i].results = pieces_of(p, i);
        p->out[i].parts = pieces_of(p, i), p->out[i].results = pieces_of(p, rank);
    }
    PyObject *capsule = PyCapsule_New(p, NAME, free_pump);
    if (capsule == NULL) goto failed;
    return capsule;
wrong:
    PyErr_SetString(PyExc_ValueError, "no such pump: 2 to 64 pairs of descriptors, a known type, whole lines are expected");
failed:
    if (p != NULL) free(p->steps);
    free(p);
    return NULL;
}

PyObject *py_pump_advance(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule;
    int fd;
    unsigned long long limit_ns;
    if (!PyArg_ParseTuple(args, "OiK", &capsule, &fd, &limit_ns)) return NULL;
    pump *p = PyCapsule_GetPointer(capsule, NAME);
    if (p == NULL) return NULL;
    enum state state;
    Py_BEGIN_ALLOW_THREADS
    state = advance(p, fd, limit_ns);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("ii", state, state == BROKEN ? p->broken : p->blamed);
}

PyObject *py_pump_progress(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule;
    int rank;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &rank)) return NULL;
    pump *p = PyCapsule_GetPointer(capsule, NAME);
    if (p == NULL) return NULL;
    if (rank < 0 || rank >= p->size) {
        PyErr_SetString(PyExc_ValueError, "no such rank");
        return NULL;
    }
    const way *in = &p->in[rank], *out = &p->out[rank];
    return Py_BuildValue("KKKKii", (unsigned long long)out->bytes, (unsigned long long)in->bytes,
                         (unsigned long long)out->blocked_ns, (unsigned long long)in->blocked_ns, over(out), over(in));
}

PyObject *py_pump_restore(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O", &capsule)) return NULL;
    pump *p = PyCapsule_GetPointer(capsule, NAME);
    if (p == NULL) return NULL;
    if (p->undo == NULL) Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    for (int rank = 0; rank < p->size; rank++) {
        size_t start = start_of(p, rank), length = length_of(p, rank);
        const way *in = &p->in[rank];
        size_t pieces = rank == p->rank ? p->reduced : in->result + (in->off && !is_part(in, p->window));
        memcpy(p->target + start, p->undo + start, smaller(pieces * p->piece, length));
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
