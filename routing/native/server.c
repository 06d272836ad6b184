/* The answering side of one connection: whole, valid dispatch frames in, answers out, never blocking. */

#include "native.h"

#include <errno.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum {
    FIRST_BUFFER_BYTES = 1 << 20,
    MAX_READ_BYTES = 8 << 20 /* in one call, so that a fast client does not keep the others waiting */
};

/* An answer that the socket has not taken whole. */
typedef struct answer {
    struct answer *next;
    unsigned char header[HEADER_BYTES];
    PyObject *owner; /* of `body` */
    const char *body;
    size_t body_bytes, sent;
} answer;

typedef struct {
    PyObject_HEAD
    int fd;
    uint8_t dtype;
    uint32_t width;
    frame_limits limits;
    PyObject *buffer;  /* bytearray */
    Py_buffer memory;  /* of `buffer`, so that nobody resizes it */
    size_t have, used; /* bytes received; those of the frame at hand */
    frame_header at_hand;
    answer *first, *last;
    size_t unsent;
} ServerStream;

static char *received(const ServerStream *stream)
{
    return stream->memory.buf;
}

/* -- in ------------------------------------------------------------------------------------------------------------ */

static bool are_rows_there(const ServerStream *stream, const frame_header *header)
{
    size_t tensor = (size_t)header->rows * header->width * dtype_bytes(header->dtype);
    const char *named = received(stream) + HEADER_BYTES + tensor + (size_t)header->pairs * 4;
    uint32_t largest = 0; /* as unsigned numbers, negative rows are the largest of all */
    for (size_t i = 0; i < header->pairs; i++) {
        uint32_t row;
        memcpy(&row, named + i * 4, 4);
        largest = row > largest ? row : largest;
    }
    return largest < header->rows;
}

typedef enum { NOTHING_YET, FRAME_AT_HAND, NOT_A_FRAME, NEEDS_ROOM } progress;

/* What the buffer begins with; `need` is the length of the frame whose header is there. */
static progress look(ServerStream *stream, size_t *need)
{
    frame_header header;
    if (stream->have < HEADER_BYTES)
        return NOTHING_YET;
    if (!parse_header((const unsigned char *)received(stream), &stream->limits, &header) ||
        header.kind != KIND_DISPATCH || header.width != stream->width || header.dtype != stream->dtype)
        return NOT_A_FRAME;
    *need = HEADER_BYTES + (size_t)body_bytes(&header);
    if (stream->have < *need)
        return *need > (size_t)stream->memory.len ? NEEDS_ROOM : NOTHING_YET;
    if (!are_rows_there(stream, &header))
        return NOT_A_FRAME;
    stream->at_hand = header;
    stream->used = *need;
    return FRAME_AT_HAND;
}

static bool grow(ServerStream *stream, size_t bytes)
{
    Py_buffer memory;
    PyObject *grown = new_buffer(bytes, &memory);
    if (grown == NULL)
        return false;
    memcpy(memory.buf, stream->memory.buf, stream->have);
    PyBuffer_Release(&stream->memory);
    stream->memory = memory;
    Py_SETREF(stream->buffer, grown);
    return true;
}

static ssize_t read_some(const ServerStream *stream, size_t missing)
{
    char *to = received(stream) + stream->have;
    size_t room = (size_t)stream->memory.len - stream->have;
    ssize_t got;
    do {
        if (missing <= SMALL_TRANSFER_BYTES) {
            got = recv(stream->fd, to, room, MSG_DONTWAIT);
        } else {
            Py_BEGIN_ALLOW_THREADS
            got = recv(stream->fd, to, room, MSG_DONTWAIT);
            Py_END_ALLOW_THREADS
        }
    } while (got < 0 && errno == EINTR);
    return got;
}

/* receive() -> True: a whole frame is at hand; False: not yet; None: what came is no frame for this shard.
   Raises OSError: ConnectionResetError if the client closed, ENOMEM if no memory is left for the frame. */
static PyObject *stream_receive(ServerStream *stream, PyObject *ignored)
{
    (void)ignored;
    stream->have -= stream->used;
    if (stream->used > 0 && stream->have > 0)
        memmove(received(stream), received(stream) + stream->used, stream->have);
    stream->used = 0;
    size_t need = 0;
    for (size_t done = 0;;) {
        switch (look(stream, &need)) {
        case FRAME_AT_HAND:
            Py_RETURN_TRUE;
        case NOT_A_FRAME:
            Py_RETURN_NONE;
        case NEEDS_ROOM:
            if (!grow(stream, need)) {
                if (!PyErr_ExceptionMatches(PyExc_MemoryError))
                    return NULL;
                PyErr_Clear(); /* the frame's length is the client's doing, and concerns its connection only */
                errno = ENOMEM;
                return PyErr_SetFromErrno(PyExc_OSError);
            }
            break;
        case NOTHING_YET:
            break;
        }
        if (done >= MAX_READ_BYTES)
            Py_RETURN_FALSE;
        ssize_t got = read_some(stream, need > stream->have ? need - stream->have : 0);
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            Py_RETURN_FALSE;
        if (got < 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (got == 0) {
            PyErr_SetString(PyExc_ConnectionResetError, "closed by the client");
            return NULL;
        }
        stream->have += (size_t)got;
        done += (size_t)got;
    }
}

/* -- out ----------------------------------------------------------------------------------------------------------- */

/* Writes what the socket takes of a header and a body; bytes written in all, or -1 with errno. */
static ssize_t write_some(int fd, const unsigned char *header, const char *body, size_t body_bytes, size_t sent)
{
    union {
        const void *from;
        void *base;
    } head = {.from = header + (sent < HEADER_BYTES ? sent : HEADER_BYTES)},
      tail = {.from = body + (sent > HEADER_BYTES ? sent - HEADER_BYTES : 0)}; /* sendmsg does not write there */
    size_t left = HEADER_BYTES + body_bytes - sent, head_left = sent < HEADER_BYTES ? HEADER_BYTES - sent : 0;
    struct iovec pieces[2] = {
        {.iov_base = head.base, .iov_len = head_left},
        {.iov_base = tail.base, .iov_len = left - head_left},
    };
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};
    ssize_t written;
    do {
        if (left <= SMALL_TRANSFER_BYTES) {
            written = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        } else {
            Py_BEGIN_ALLOW_THREADS
            written = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
            Py_END_ALLOW_THREADS
        }
    } while (written < 0 && errno == EINTR);
    return written;
}

static void drop_first(ServerStream *stream)
{
    answer *done = stream->first;
    stream->first = done->next;
    if (stream->first == NULL)
        stream->last = NULL;
    Py_DECREF(done->owner);
    PyMem_Free(done);
}

/* Writes what the socket takes of the answers that wait. False with OSError set. */
static bool flush_answers(ServerStream *stream)
{
    while (stream->first != NULL) {
        answer *next = stream->first;
        ssize_t written = write_some(stream->fd, next->header, next->body, next->body_bytes, next->sent);
        if (written < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                return true;
            PyErr_SetFromErrno(PyExc_OSError);
            return false;
        }
        next->sent += (size_t)written;
        stream->unsent -= (size_t)written;
        if (next->sent == HEADER_BYTES + next->body_bytes)
            drop_first(stream);
    }
    return true;
}

/* Sends an answer as far as the socket takes it and keeps the rest, with its owner, for later. */
static PyObject *send_answer(ServerStream *stream, const frame_header *header, PyObject *owner, const char *body,
                             size_t body_bytes)
{
    unsigned char packed[HEADER_BYTES];
    pack_header(header, packed);
    size_t sent = 0;
    if (stream->first == NULL) {
        ssize_t written = write_some(stream->fd, packed, body, body_bytes, 0);
        if (written < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            return PyErr_SetFromErrno(PyExc_OSError);
        sent = written < 0 ? 0 : (size_t)written;
        if (sent == HEADER_BYTES + body_bytes)
            Py_RETURN_NONE;
    }
    answer *rest = PyMem_Malloc(sizeof *rest);
    if (rest == NULL)
        return PyErr_NoMemory();
    Py_INCREF(owner);
    *rest = (answer){.owner = owner, .body = body, .body_bytes = body_bytes, .sent = sent};
    memcpy(rest->header, packed, HEADER_BYTES);
    if (stream->last == NULL)
        stream->first = rest;
    else
        stream->last->next = rest;
    stream->last = rest;
    stream->unsent += HEADER_BYTES + body_bytes - sent;
    return flush_answers(stream) ? Py_NewRef(Py_None) : NULL;
}

static uint32_t as_u32(PyObject *number)
{
    unsigned long value = PyLong_AsUnsignedLong(number);
    return value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
}

/* answer(owner, address, epoch, computed_us, waited_us): y of the frame at hand, as many bytes as its x.
   `owner` keeps them where they are until they are sent. Raises OSError. */
static PyObject *stream_answer(ServerStream *stream, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "answer(owner, address, epoch, computed_us, waited_us)");
        return NULL;
    }
    frame_header header = stream->at_hand;
    header.kind = KIND_COMBINE;
    header.pairs = 0;
    const char *body = PyLong_AsVoidPtr(args[1]);
    header.epoch = PyLong_AsUnsignedLongLong(args[2]);
    header.first = as_u32(args[3]);
    header.second = as_u32(args[4]);
    if (PyErr_Occurred())
        return NULL;
    return send_answer(stream, &header, args[0], body, (size_t)body_bytes(&header));
}

/* refuse(code, message, epoch): why the frame at hand can't be computed, bytes that are cut to the wire's limit.
   Raises OSError. */
static PyObject *stream_refuse(ServerStream *stream, PyObject *args)
{
    unsigned int code;
    unsigned long long epoch;
    PyObject *message;
    if (!PyArg_ParseTuple(args, "ISK", &code, &message, &epoch))
        return NULL;
    size_t bytes = (size_t)PyBytes_GET_SIZE(message);
    frame_header header = {
        .kind = KIND_ERROR,
        .layer = stream->at_hand.layer,
        .rows = bytes > MAX_MESSAGE_BYTES ? MAX_MESSAGE_BYTES : (uint32_t)bytes,
        .pairs = code,
        .epoch = epoch,
        .frame = stream->at_hand.frame,
    };
    return send_answer(stream, &header, message, PyBytes_AS_STRING(message), header.rows);
}

/* flush(): writes more of the answers that wait. Raises OSError. */
static PyObject *stream_flush(ServerStream *stream, PyObject *ignored)
{
    (void)ignored;
    return flush_answers(stream) ? Py_NewRef(Py_None) : NULL;
}

/* -- the Python type ----------------------------------------------------------------------------------------------- */

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    int fd;
    unsigned char dtype;
    unsigned int width;
    PyObject *rows, *bytes, *pairs;
    frame_limits limits;
    if (keywords != NULL && PyDict_GET_SIZE(keywords) > 0) {
        PyErr_SetString(PyExc_TypeError, "ServerStream takes positional arguments only");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "ibIOOO", &fd, &dtype, &width, &rows, &bytes, &pairs) ||
        !read_limits(rows, bytes, pairs, &limits))
        return NULL;
    ServerStream *stream = (ServerStream *)type->tp_alloc(type, 0);
    if (stream == NULL)
        return NULL;
    stream->fd = fd;
    stream->dtype = dtype;
    stream->width = width;
    stream->limits = limits;
    stream->buffer = new_buffer(FIRST_BUFFER_BYTES, &stream->memory);
    if (stream->buffer == NULL)
        Py_CLEAR(stream);
    return (PyObject *)stream;
}

static void stream_dealloc(ServerStream *stream)
{
    while (stream->first != NULL)
        drop_first(stream);
    if (stream->buffer != NULL)
        PyBuffer_Release(&stream->memory);
    Py_XDECREF(stream->buffer);
    Py_TYPE(stream)->tp_free((PyObject *)stream);
}

static PyObject *stream_close(ServerStream *stream, PyObject *ignored)
{
    (void)ignored;
    stream->fd = -1; /* the number may soon be another file's */
    while (stream->first != NULL)
        drop_first(stream);
    stream->unsent = 0;
    Py_RETURN_NONE;
}

static PyObject *stream_has_input(ServerStream *stream, void *ignored)
{
    (void)ignored;
    return PyBool_FromLong(stream->have > stream->used);
}

static PyObject *stream_received(ServerStream *stream, void *ignored)
{
    (void)ignored;
    return PyBytes_FromStringAndSize(received(stream), (Py_ssize_t)stream->have);
}

static PyMethodDef stream_methods[] = {
    {"receive", (PyCFunction)(void (*)(void))stream_receive, METH_NOARGS, NULL},
    {"answer", (PyCFunction)(void (*)(void))stream_answer, METH_FASTCALL, NULL},
    {"refuse", (PyCFunction)(void (*)(void))stream_refuse, METH_VARARGS, NULL},
    {"flush", (PyCFunction)(void (*)(void))stream_flush, METH_NOARGS, NULL},
    {"close", (PyCFunction)(void (*)(void))stream_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef stream_properties[] = {
    {"has_input", (getter)(void (*)(void))stream_has_input, NULL, NULL, NULL},
    {"received", (getter)(void (*)(void))stream_received, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef stream_members[] = {
    {"layer", T_UINT, offsetof(ServerStream, at_hand.layer), READONLY, NULL},
    {"rows", T_UINT, offsetof(ServerStream, at_hand.rows), READONLY, NULL},
    {"pairs", T_UINT, offsetof(ServerStream, at_hand.pairs), READONLY, NULL},
    {"frame", T_ULONGLONG, offsetof(ServerStream, at_hand.frame), READONLY, NULL},
    {"buffer", T_OBJECT, offsetof(ServerStream, buffer), READONLY, NULL},
    {"unsent", T_PYSSIZET, offsetof(ServerStream, unsent), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject ServerStreamType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "expertmesh.routing.native._frames.ServerStream",
    .tp_basicsize = sizeof(ServerStream),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = stream_new,
    .tp_dealloc = (destructor)(void (*)(void))stream_dealloc,
    .tp_methods = stream_methods,
    .tp_getset = stream_properties,
    .tp_members = stream_members,
};
