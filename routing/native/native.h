/* What the parts of the extension share. */

#ifndef EXPERTMESH_NATIVE_H
#define EXPERTMESH_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "frame.h"

#include <time.h>

/* Transfers up to this size keep the GIL: taking it back may cost more than they do. */
enum { SMALL_TRANSFER_BYTES = 1 << 16 };

/* expertmesh.errors.WireError */
extern PyObject *wire_error;

extern PyTypeObject ClientStreamType, ServerStreamType, StepPackerType;

/* A frame on its way out and the answer to it, on the sending side of one connection. */
typedef enum { STREAM_IDLE, STREAM_WAITING, STREAM_ANSWERED, STREAM_REFUSED, STREAM_BROKEN, STREAM_OVERDUE } stream_state;

typedef struct {
    PyObject_HEAD
    int fd;
    frame_limits limits;
    int state;
    bool in_use; /* by an exchange, which runs without the GIL */

    unsigned char header[HEADER_BYTES];
    const char *x; /* rows of the frame: the caller's, or `gathered` */
    size_t x_bytes;
    char *gathered;
    size_t gathered_capacity;
    char *pairs; /* experts [P], rows [P], weights [P] */
    size_t pairs_bytes, pairs_capacity;
    size_t sent, total;

    frame_header expected; /* what a right answer says; epoch and times are the answer's once it is here */
    PyObject *buffer;      /* bytearray: header and body of the answer */
    Py_buffer memory;      /* of `buffer`, so that nobody resizes it */
    size_t have, used;     /* bytes received; those at the front that nobody needs any more */
    uint64_t skip;         /* bytes of a late answer that are still to come */

    int error;                            /* errno of a broken stream; 0: closed by the peer; -1: not the protocol */
    unsigned char bad[HEADER_BYTES];      /* the header that is not the protocol's, or not right */
    size_t message_bytes;                 /* of a refusal */
    char message[MAX_MESSAGE_BYTES];
} ClientStream;

/* Of the clock behind Python's time.monotonic_ns. */
static inline int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Reads limits from Python numbers. False with an exception set if one is negative or no number. */
bool read_limits(PyObject *max_rows, PyObject *max_bytes, PyObject *max_pairs_per_row, frame_limits *limits);

/* Grows `*memory` to at least `bytes`, contents lost. False with MemoryError set. */
bool reserve(char **memory, size_t *capacity, size_t bytes);

/* A new bytearray of `bytes`, uninitialised, with its memory held in `view`. NULL with an exception set. */
PyObject *new_buffer(size_t bytes, Py_buffer *view);

/* Makes a stream ready for a frame with this header, whose `header->pairs` pairs are to be filled in `stream->pairs`.
   False with an exception set. */
bool stage_frame(ClientStream *stream, const frame_header *header);

/* The stream, borrowed, of a frame: a (target, ClientStream) tuple. NULL with an exception set. */
ClientStream *stream_of(PyObject *frame);

/* exchange(frames, timeout_s) -> whether all were answered */
PyObject *exchange(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

/* add_parts(counters, frames, began_ns, staged_ns, exchanged_ns) */
PyObject *add_parts(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

/* count_experts(experts, pairs, into, layer) */
PyObject *count_experts(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

#endif
