/* The sending side of connections: one frame out and its answer in on each, all at once and without the GIL. */

#include "native.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum {
    FIRST_BUFFER_BYTES = 1 << 16,
    MAX_READS = 16, /* before the deadline is looked at again */
    STREAMS_ON_STACK = 64
};

_Static_assert(FIRST_BUFFER_BYTES >= HEADER_BYTES + MAX_MESSAGE_BYTES, "a refusal always fits");

static const double MAX_TIMEOUT_S = 1e9;

/* -- one stream ---------------------------------------------------------------------------------------------------- */

static void fail(ClientStream *stream, int error)
{
    stream->state = STREAM_BROKEN;
    stream->error = error;
}

static void fail_protocol(ClientStream *stream)
{
    memcpy(stream->bad, stream->memory.buf, HEADER_BYTES);
    fail(stream, -1);
}

static char *received(const ClientStream *stream)
{
    return stream->memory.buf;
}

/* Forgets the first bytes of the buffer. */
static void drop_front(ClientStream *stream, size_t bytes)
{
    stream->have -= bytes;
    if (stream->have > 0)
        memmove(received(stream), received(stream) + bytes, stream->have);
}

static bool has_output(const ClientStream *stream)
{
    return stream->sent < stream->total;
}

/* Adds what is left of a piece of the frame, which begins `at` bytes into it. */
static void add_piece(struct iovec *pieces, size_t *count, const ClientStream *stream, size_t at, const char *start,
                      size_t bytes)
{
    if (stream->sent >= at + bytes)
        return;
    size_t done = stream->sent > at ? stream->sent - at : 0;
    union {
        const char *from;
        void *base;
    } address = {.from = start + done}; /* sendmsg does not write there */
    pieces[(*count)++] = (struct iovec){.iov_base = address.base, .iov_len = bytes - done};
}

/* Writes what the socket takes. */
static void send_some(ClientStream *stream)
{
    while (has_output(stream)) {
        struct iovec pieces[3];
        size_t count = 0;
        add_piece(pieces, &count, stream, 0, (const char *)stream->header, HEADER_BYTES);
        add_piece(pieces, &count, stream, HEADER_BYTES, stream->x, stream->x_bytes);
        add_piece(pieces, &count, stream, HEADER_BYTES + stream->x_bytes, stream->pairs, stream->pairs_bytes);
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
        ssize_t sent = sendmsg(stream->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                fail(stream, errno);
            return;
        }
        stream->sent += (size_t)sent;
    }
}

static bool is_right_answer(const ClientStream *stream, const frame_header *header)
{
    const frame_header *expected = &stream->expected;
    return header->kind == KIND_COMBINE && header->dtype == expected->dtype && header->layer == expected->layer &&
           header->rows == expected->rows && header->width == expected->width && !has_output(stream);
}

/* Uses up what is in the buffer; how many bytes the buffer should hold before it is looked at again, 0 when done. */
static size_t look(ClientStream *stream)
{
    const size_t whole = HEADER_BYTES + (size_t)body_bytes(&stream->expected);
    while (stream->have >= HEADER_BYTES) {
        frame_header header;
        if (!parse_header((const unsigned char *)received(stream), &stream->limits, &header)) {
            fail_protocol(stream);
            return 0;
        }
        size_t need = HEADER_BYTES + (size_t)body_bytes(&header);
        if (header.frame != stream->expected.frame) { /* a late answer */
            size_t there = need < stream->have ? need : stream->have;
            stream->skip = need - there;
            drop_front(stream, there);
            continue;
        }
        if (header.kind != KIND_ERROR && !is_right_answer(stream, &header)) {
            fail_protocol(stream);
            return 0;
        }
        if (stream->have < need)
            return need;
        if (header.kind == KIND_ERROR) {
            stream->state = STREAM_REFUSED;
            stream->message_bytes = header.rows;
            memcpy(stream->message, received(stream) + HEADER_BYTES, header.rows);
        } else {
            stream->state = STREAM_ANSWERED;
            stream->expected = header;
        }
        stream->used = need;
        return 0;
    }
    return stream->skip > 0 ? stream->skip : whole;
}

/* Reads and uses what is there. */
static void receive_some(ClientStream *stream)
{
    size_t want = look(stream);
    for (int reads = 0; want > 0 && reads < MAX_READS; reads++) {
        size_t capacity = (size_t)stream->memory.len;
        ssize_t got = recv(stream->fd, received(stream) + stream->have,
                           (want < capacity ? want : capacity) - stream->have, MSG_DONTWAIT);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                fail(stream, errno);
            return;
        }
        if (got == 0) {
            fail(stream, 0);
            return;
        }
        if (stream->skip > 0)
            stream->skip -= (size_t)got;
        else
            stream->have += (size_t)got;
        want = look(stream);
    }
}

/* -- all streams of a step ----------------------------------------------------------------------------------------- */

/* Sends and receives until no stream waits, or those that do are overdue. Whether it got there without a signal. */
static bool drive(ClientStream **streams, struct pollfd *watched, size_t count, int64_t deadline)
{
    for (size_t i = 0; i < count; i++) {
        if (streams[i]->state == STREAM_WAITING)
            send_some(streams[i]);
    }
    for (;;) {
        size_t waiting = 0;
        for (size_t i = 0; i < count; i++) {
            ClientStream *stream = streams[i];
            short events = has_output(stream) ? POLLIN | POLLOUT : POLLIN;
            bool waits = stream->state == STREAM_WAITING;
            watched[i] = (struct pollfd){.fd = waits ? stream->fd : -1, .events = events};
            waiting += waits;
        }
        if (waiting == 0)
            return true;
        int64_t left = deadline - now_ns();
        if (left <= 0) {
            for (size_t i = 0; i < count; i++) {
                if (streams[i]->state == STREAM_WAITING)
                    streams[i]->state = STREAM_OVERDUE;
            }
            return true;
        }
        struct timespec timeout = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        int ready = ppoll(watched, count, &timeout, NULL);
        if (ready < 0 && errno == EINTR)
            return false;
        for (size_t i = 0; i < count && ready > 0; i++) {
            if (watched[i].revents & POLLOUT)
                send_some(streams[i]);
            if (watched[i].revents & ~POLLOUT && streams[i]->state == STREAM_WAITING)
                receive_some(streams[i]);
        }
    }
}

static bool drive_all(ClientStream **streams, struct pollfd *watched, size_t count, double timeout_s)
{
    int64_t deadline = now_ns() + (int64_t)(timeout_s * 1e9);
    for (;;) {
        bool done;
        Py_BEGIN_ALLOW_THREADS
        done = drive(streams, watched, count, deadline);
        Py_END_ALLOW_THREADS
        if (done)
            return true;
        if (PyErr_CheckSignals() < 0)
            return false;
    }
}

ClientStream *stream_of(PyObject *frame)
{
    if (PyTuple_Check(frame) && PyTuple_GET_SIZE(frame) == 2 && Py_IS_TYPE(PyTuple_GET_ITEM(frame, 1), &ClientStreamType))
        return (ClientStream *)PyTuple_GET_ITEM(frame, 1);
    PyErr_SetString(PyExc_TypeError, "frames are (target, ClientStream) tuples");
    return NULL;
}

/* Takes the streams of a sequence for this exchange; how many it took, all of them or with an exception set. */
static size_t take(PyObject *sequence, ClientStream **streams, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        streams[i] = stream_of(PySequence_Fast_GET_ITEM(sequence, (Py_ssize_t)i));
        if (streams[i] == NULL)
            return i;
        if (streams[i]->in_use) {
            PyErr_SetString(PyExc_RuntimeError, "a stream in two exchanges, or twice in one");
            return i;
        }
        Py_INCREF(streams[i]);
        streams[i]->in_use = true;
        if (streams[i]->state == STREAM_OVERDUE) /* it is given more time */
            streams[i]->state = STREAM_WAITING;
    }
    return count;
}

PyObject *exchange(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "exchange(frames, timeout_s)");
        return NULL;
    }
    double timeout_s = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred())
        return NULL;
    if (isnan(timeout_s)) {
        PyErr_SetString(PyExc_ValueError, "timeout_s is not a number");
        return NULL;
    }
    timeout_s = timeout_s < 0 ? 0 : timeout_s > MAX_TIMEOUT_S ? MAX_TIMEOUT_S : timeout_s;
    PyObject *sequence = PySequence_Fast(args[0], "exchange takes a sequence of frames");
    if (sequence == NULL)
        return NULL;
    size_t count = (size_t)PySequence_Fast_GET_SIZE(sequence);
    ClientStream *few[STREAMS_ON_STACK];
    struct pollfd few_watched[STREAMS_ON_STACK];
    bool many = count > STREAMS_ON_STACK;
    ClientStream **streams = many ? PyMem_Calloc(count, sizeof *streams) : few;
    struct pollfd *watched = many ? PyMem_Calloc(count, sizeof *watched) : few_watched;
    bool done = false;
    size_t taken = 0;
    if (streams == NULL || watched == NULL) {
        PyErr_NoMemory();
    } else {
        taken = take(sequence, streams, count);
        done = taken == count && drive_all(streams, watched, count, timeout_s);
    }
    bool answered = true;
    for (size_t i = 0; i < taken; i++) {
        answered = answered && streams[i]->state == STREAM_ANSWERED;
        streams[i]->in_use = false;
        Py_DECREF(streams[i]);
    }
    if (many) {
        PyMem_Free(streams);
        PyMem_Free(watched);
    }
    Py_DECREF(sequence);
    return done ? PyBool_FromLong(answered) : NULL;
}

/* -- the Python type ----------------------------------------------------------------------------------------------- */

bool stage_frame(ClientStream *stream, const frame_header *header)
{
    if (stream->in_use) {
        PyErr_SetString(PyExc_RuntimeError, "the stream is in an exchange");
        return false;
    }
    frame_header expected = *header;
    expected.kind = KIND_COMBINE;
    expected.pairs = 0;
    size_t pairs_bytes = (size_t)header->pairs * PAIR_BYTES;
    if (!reserve(&stream->pairs, &stream->pairs_capacity, pairs_bytes))
        return false;
    drop_front(stream, stream->used);
    stream->used = 0;
    size_t need = HEADER_BYTES + (size_t)body_bytes(&expected);
    if (need > (size_t)stream->memory.len) {
        Py_buffer memory;
        PyObject *grown = new_buffer(need, &memory);
        if (grown == NULL)
            return false;
        memcpy(memory.buf, stream->memory.buf, stream->have);
        PyBuffer_Release(&stream->memory);
        stream->memory = memory;
        Py_SETREF(stream->buffer, grown);
    }
    pack_header(header, stream->header);
    stream->expected = expected;
    stream->pairs_bytes = pairs_bytes;
    stream->x_bytes = need - HEADER_BYTES;
    stream->sent = 0;
    stream->total = HEADER_BYTES + stream->x_bytes + pairs_bytes;
    stream->state = STREAM_WAITING;
    return true;
}

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    int fd;
    PyObject *rows, *bytes, *pairs;
    frame_limits limits;
    if ((keywords != NULL && PyDict_GET_SIZE(keywords) > 0) || !PyArg_ParseTuple(args, "iOOO", &fd, &rows, &bytes, &pairs)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "ClientStream takes positional arguments only");
        return NULL;
    }
    if (!read_limits(rows, bytes, pairs, &limits))
        return NULL;
    ClientStream *stream = (ClientStream *)type->tp_alloc(type, 0);
    if (stream == NULL)
        return NULL;
    stream->fd = fd;
    stream->limits = limits;
    stream->buffer = new_buffer(FIRST_BUFFER_BYTES, &stream->memory);
    if (stream->buffer == NULL)
        Py_CLEAR(stream);
    return (PyObject *)stream;
}

static void stream_dealloc(ClientStream *stream)
{
    if (stream->buffer != NULL)
        PyBuffer_Release(&stream->memory);
    Py_XDECREF(stream->buffer);
    PyMem_RawFree(stream->gathered);
    PyMem_RawFree(stream->pairs);
    Py_TYPE(stream)->tp_free((PyObject *)stream);
}

static PyObject *stream_close(ClientStream *stream, PyObject *ignored)
{
    (void)ignored;
    stream->fd = -1; /* the number may soon be another file's */
    Py_RETURN_NONE;
}

static PyObject *stream_message(ClientStream *stream, void *ignored)
{
    (void)ignored;
    return PyBytes_FromStringAndSize(stream->message, (Py_ssize_t)stream->message_bytes);
}

static PyObject *stream_bad_header(ClientStream *stream, void *ignored)
{
    (void)ignored;
    return PyBytes_FromStringAndSize((const char *)stream->bad, HEADER_BYTES);
}

static PyMethodDef stream_methods[] = {
    {"close", (PyCFunction)(void (*)(void))stream_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef stream_properties[] = {
    {"message", (getter)(void (*)(void))stream_message, NULL, NULL, NULL},
    {"bad_header", (getter)(void (*)(void))stream_bad_header, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef stream_members[] = {
    {"state", T_INT, offsetof(ClientStream, state), READONLY, NULL},
    {"error", T_INT, offsetof(ClientStream, error), READONLY, NULL},
    {"rows", T_UINT, offsetof(ClientStream, expected.rows), READONLY, NULL},
    {"computed_us", T_UINT, offsetof(ClientStream, expected.first), READONLY, NULL},
    {"waited_us", T_UINT, offsetof(ClientStream, expected.second), READONLY, NULL},
    {"buffer", T_OBJECT, offsetof(ClientStream, buffer), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject ClientStreamType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "expertmesh.routing.native._frames.ClientStream",
    .tp_basicsize = sizeof(ClientStream),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = stream_new,
    .tp_dealloc = (destructor)(void (*)(void))stream_dealloc,
    .tp_methods = stream_methods,
    .tp_getset = stream_properties,
    .tp_members = stream_members,
};
