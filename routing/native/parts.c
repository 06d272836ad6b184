/* What a dispatch took, added to counters that another process reads. */

#include "native.h"

/* In the order of routing/dispatch/mailbox.py. */
enum { FRAMES, BYTES_SENT, BYTES_RECEIVED, ROUTE_NS, EXCHANGE_NS, QUEUE_NS, COMPUTE_NS, COMBINE_NS, COUNTERS };

/* Adds what frames moved, and the times of the answer that took longest at its shard. False with an exception set. */
static bool add_frames(int64_t *counters, PyObject *sequence)
{
    int64_t queue_us = 0, compute_us = 0;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    for (Py_ssize_t i = 0; i < count; i++) {
        const ClientStream *stream = stream_of(PySequence_Fast_GET_ITEM(sequence, i));
        if (stream == NULL)
            return false;
        counters[BYTES_SENT] += (int64_t)stream->sent;
        if (stream->state != STREAM_ANSWERED)
            continue;
        counters[BYTES_RECEIVED] += (int64_t)stream->used;
        if ((int64_t)stream->expected.first + stream->expected.second > queue_us + compute_us) {
            compute_us = stream->expected.first;
            queue_us = stream->expected.second;
        }
    }
    counters[FRAMES] += count;
    counters[QUEUE_NS] += queue_us * 1000;
    counters[COMPUTE_NS] += compute_us * 1000;
    return true;
}

PyObject *add_parts(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "add_parts(counters, frames, began_ns, staged_ns, exchanged_ns)");
        return NULL;
    }
    const int64_t began = PyLong_AsLongLong(args[2]), staged = PyLong_AsLongLong(args[3]),
                  exchanged = PyLong_AsLongLong(args[4]);
    Py_buffer into;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &into, PyBUF_ND | PyBUF_WRITABLE) < 0)
        return NULL;
    bool done = false;
    if (into.itemsize != sizeof(int64_t) || (uintptr_t)into.buf % sizeof(int64_t) != 0 ||
        into.len < (Py_ssize_t)(COUNTERS * sizeof(int64_t))) {
        PyErr_Format(PyExc_ValueError, "counters are %d int64s", COUNTERS);
    } else {
        PyObject *sequence = PySequence_Fast(args[1], "add_parts takes a sequence of frames");
        int64_t *counters = into.buf;
        done = sequence != NULL && add_frames(counters, sequence);
        Py_XDECREF(sequence);
        if (done) {
            counters[ROUTE_NS] += staged - began;
            counters[EXCHANGE_NS] += exchanged - staged;
            counters[COMBINE_NS] += now_ns() - exchanged;
        }
    }
    PyBuffer_Release(&into);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}
