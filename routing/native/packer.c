/* From the router's ids of one step to a frame for each shard, which pairs go where and the rows that they need, and
   from the answers back to one sum. */

#include "native.h"
#include "sum.h"

#include <string.h>

enum { FRAMES_ON_STACK = 64 };

typedef struct {
    uint32_t pairs;
    uint32_t rows;  /* distinct tokens among them */
    uint64_t begin; /* of its pairs in `order` */
    int64_t last;   /* token of its last pair so far */
} tally;

typedef struct {
    PyObject_HEAD
    frame_limits limits;
    /* The step at hand; addresses are the caller's. */
    const char *x;
    const int32_t *experts;
    const float *weights;
    uint8_t dtype;
    uint32_t width, tokens, top_k;
    size_t row_bytes;
    /* Targets -1 to S - 1, each at its number + 1. */
    tally *tallies;
    size_t targets;
    int64_t *order; /* positions of pairs, by target and ascending */
    size_t order_capacity;
    int32_t *chosen; /* target of each pair that is to be sent */
    size_t chosen_capacity;
    int64_t *left; /* tokens that each copy still takes */
    size_t left_capacity;
    float *sum; /* one row */
    size_t sum_capacity;
} StepPacker;

static const void *address(PyObject *number)
{
    return PyLong_AsVoidPtr(number);
}

/* A C-contiguous buffer of items of `item` bytes. False with an exception set. */
static bool get_items(PyObject *object, size_t item, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_ND) < 0)
        return false;
    if ((size_t)view->itemsize == item && (uintptr_t)view->buf % item == 0)
        return true;
    PyErr_Format(PyExc_ValueError, "a buffer of items of %zd bytes where %zu are wanted", view->itemsize, item);
    PyBuffer_Release(view);
    return false;
}

PyObject *count_experts(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "count_experts(experts, pairs, into, layer)");
        return NULL;
    }
    const int32_t *experts = address(args[0]);
    Py_ssize_t pairs = PyLong_AsSsize_t(args[1]);
    Py_buffer into;
    if (PyErr_Occurred() || !get_items(args[2], sizeof(int64_t), &into))
        return NULL;
    int64_t *counts = into.buf;
    const Py_ssize_t known = into.len / (Py_ssize_t)sizeof(int64_t);
    Py_ssize_t wrong = -1;
    for (Py_ssize_t pair = 0; pair < pairs && wrong < 0; pair++) {
        if (experts[pair] < 0 || experts[pair] >= known)
            wrong = pair;
    }
    for (Py_ssize_t pair = 0; pair < pairs && wrong < 0; pair++)
        counts[experts[pair]]++;
    PyBuffer_Release(&into);
    if (wrong < 0)
        Py_RETURN_NONE;
    PyErr_Format(wire_error, "layer %S: the router chose expert %d; the placement has experts 0 to %zd", args[3],
                 (int)experts[wrong], known - 1);
    return NULL;
}

static bool reserve_items(void *memory, size_t *capacity, size_t count, size_t item)
{
    char *bytes;
    memcpy(&bytes, memory, sizeof bytes);
    size_t have = *capacity * item;
    bool done = reserve(&bytes, &have, count * item);
    memcpy(memory, &bytes, sizeof bytes);
    *capacity = have / item;
    return done;
}

/* -- which pair goes where ----------------------------------------------------------------------------------------- */

typedef struct {
    const int32_t *copies; /* [experts, width] */
    const int64_t *shares; /* the same, or NULL: everything to the first copy */
    size_t experts, width;
} choice;

/* Target of the next pair of an expert: the first of its copies that takes more; -1 if there is none. */
static int32_t next_target(StepPacker *packer, const choice *from, size_t expert)
{
    const int32_t *copies = from->copies + expert * from->width;
    if (from->shares == NULL)
        return copies[0];
    int64_t *left = packer->left + expert * from->width;
    for (size_t copy = 0; copy < from->width; copy++) {
        if (left[copy] > 0) {
            left[copy]--;
            return copies[copy];
        }
    }
    return -1;
}

/* Fills `chosen`, `order` and the tallies. False with an exception set. */
static bool sort_pairs(StepPacker *packer, const choice *from, const int64_t *subset, size_t count)
{
    const size_t pairs = (size_t)packer->tokens * packer->top_k;
    int64_t before = -1;
    for (size_t i = 0; i < count; i++) {
        int64_t position = subset == NULL ? (int64_t)i : subset[i];
        if (position <= before || (size_t)position >= pairs) {
            PyErr_SetString(PyExc_ValueError, "positions of pairs must ascend within the step");
            return false;
        }
        before = position;
        int32_t expert = packer->experts[position];
        if (expert < 0 || (size_t)expert >= from->experts) {
            PyErr_Format(PyExc_ValueError, "expert %d of %zu", (int)expert, from->experts);
            return false;
        }
        int32_t target = next_target(packer, from, (size_t)expert);
        if (target < -1 || target >= (int64_t)packer->targets - 1) {
            PyErr_Format(PyExc_ValueError, "target %d of %zu", (int)target, packer->targets - 1);
            return false;
        }
        packer->chosen[i] = target;
        tally *taken = &packer->tallies[target + 1];
        int64_t token = position / packer->top_k;
        taken->pairs++;
        taken->rows += token != taken->last;
        taken->last = token;
    }
    uint64_t begin = 0;
    for (size_t i = 0; i < packer->targets; i++) {
        packer->tallies[i].begin = begin;
        begin += packer->tallies[i].pairs;
        packer->tallies[i].pairs = 0;
    }
    for (size_t i = 0; i < count; i++) {
        tally *taken = &packer->tallies[packer->chosen[i] + 1];
        packer->order[taken->begin + taken->pairs++] = subset == NULL ? (int64_t)i : subset[i];
    }
    return true;
}

/* Raises WireError for a shard that would have to take more than a frame holds. */
static bool fits(const StepPacker *packer)
{
    const frame_limits *limits = &packer->limits;
    for (size_t i = 1; i < packer->targets; i++) {
        uint64_t rows = packer->tallies[i].rows, pairs = packer->tallies[i].pairs;
        if (rows > limits->max_rows) {
            PyErr_Format(wire_error, "%llu rows for one shard; allowed: 1 to %llu (routing.max_frame_rows)",
                         (unsigned long long)rows, (unsigned long long)limits->max_rows);
            return false;
        }
        if (rows * packer->row_bytes + pairs * PAIR_BYTES > limits->max_bytes) {
            PyErr_Format(wire_error, "%llu rows of width %u for one shard; allowed: %llu bytes (routing.max_frame_mib)",
                         (unsigned long long)rows, (unsigned int)packer->width, (unsigned long long)limits->max_bytes);
            return false;
        }
    }
    return true;
}

static PyObject *used_targets(const StepPacker *packer)
{
    PyObject *used = PyList_New(0);
    for (size_t i = 0; used != NULL && i < packer->targets; i++) {
        if (packer->tallies[i].pairs == 0)
            continue;
        PyObject *target = PyLong_FromLong((long)i - 1);
        if (target == NULL || PyList_Append(used, target) < 0)
            Py_CLEAR(used);
        Py_XDECREF(target);
    }
    return used;
}

static PyObject *route_pairs(StepPacker *packer, const choice *from, const int64_t *subset, size_t count, size_t targets)
{
    if (!reserve_items(&packer->order, &packer->order_capacity, count, sizeof *packer->order) ||
        !reserve_items(&packer->chosen, &packer->chosen_capacity, count, sizeof *packer->chosen))
        return NULL;
    tally *tallies = PyMem_RawRealloc(packer->tallies, (targets + 1) * sizeof *tallies);
    if (tallies == NULL)
        return PyErr_NoMemory();
    packer->tallies = tallies;
    packer->targets = targets + 1;
    for (size_t i = 0; i <= targets; i++)
        tallies[i] = (tally){.last = -1};
    if (from->shares != NULL) {
        size_t cells = from->experts * from->width;
        if (!reserve_items(&packer->left, &packer->left_capacity, cells, sizeof *packer->left))
            return NULL;
        memcpy(packer->left, from->shares, cells * sizeof *packer->left);
    }
    return sort_pairs(packer, from, subset, count) && fits(packer) ? used_targets(packer) : NULL;
}

/* Takes the step's addresses and sizes. False with an exception set. */
static bool begin_step(StepPacker *packer, PyObject *const *args)
{
    packer->x = address(args[0]);
    unsigned long dtype = PyLong_AsUnsignedLong(args[1]), width = PyLong_AsUnsignedLong(args[2]);
    packer->experts = address(args[3]);
    packer->weights = address(args[4]);
    unsigned long tokens = PyLong_AsUnsignedLong(args[5]), top_k = PyLong_AsUnsignedLong(args[6]);
    if (PyErr_Occurred())
        return false;
    if (dtype > UINT8_MAX || dtype_bytes((uint8_t)dtype) == 0 || width > UINT32_MAX || tokens > INT32_MAX ||
        top_k > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "a step of a size or dtype that no frame can have");
        return false;
    }
    if (top_k == 0 || top_k > packer->limits.max_pairs_per_row) {
        PyErr_Format(wire_error, "%lu experts a token; allowed: 1 to %llu", top_k,
                     (unsigned long long)packer->limits.max_pairs_per_row);
        return false;
    }
    packer->dtype = (uint8_t)dtype;
    packer->width = (uint32_t)width;
    packer->tokens = (uint32_t)tokens;
    packer->top_k = (uint32_t)top_k;
    packer->row_bytes = width * dtype_bytes((uint8_t)dtype);
    return true;
}

/* route(x, dtype, width, experts, weights, tokens, top_k, copies, shares, targets, positions) -> targets with pairs */
static PyObject *packer_route(StepPacker *packer, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 11) {
        PyErr_SetString(PyExc_TypeError, "route takes 11 arguments");
        return NULL;
    }
    packer->targets = 0; /* nothing can be staged until this is through */
    if (!begin_step(packer, args))
        return NULL;
    size_t targets = PyLong_AsSize_t(args[9]);
    if (PyErr_Occurred())
        return NULL;
    if (targets > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "too many targets");
        return NULL;
    }
    PyObject *used = NULL;
    Py_buffer copies, shares = {.obj = NULL}, subset = {.obj = NULL};
    if (!get_items(args[7], sizeof(int32_t), &copies))
        return NULL;
    if (args[8] != Py_None && !get_items(args[8], sizeof(int64_t), &shares))
        goto done;
    if (args[10] != Py_None && !get_items(args[10], sizeof(int64_t), &subset))
        goto done;
    if (copies.ndim != 2 || copies.shape[1] == 0 ||
        (shares.obj != NULL && shares.len / (Py_ssize_t)sizeof(int64_t) != copies.len / (Py_ssize_t)sizeof(int32_t))) {
        PyErr_SetString(PyExc_ValueError, "copies and shares must be [experts, copies]");
        goto done;
    }
    choice from = {
        .copies = copies.buf,
        .shares = shares.obj == NULL ? NULL : shares.buf,
        .experts = (size_t)copies.shape[0],
        .width = (size_t)copies.shape[1],
    };
    const int64_t *positions = subset.obj == NULL ? NULL : subset.buf;
    size_t count = subset.obj == NULL ? (size_t)packer->tokens * packer->top_k : (size_t)subset.len / sizeof(int64_t);
    used = route_pairs(packer, &from, positions, count, targets);
    if (used == NULL)
        packer->targets = 0;
done:
    PyBuffer_Release(&copies);
    PyBuffer_Release(&shares);
    PyBuffer_Release(&subset);
    return used;
}

/* -- one shard's frame --------------------------------------------------------------------------------------------- */

/* The tally of a target that has pairs; NULL with an exception set. */
static const tally *tally_of(const StepPacker *packer, PyObject *number)
{
    long target = PyLong_AsLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (target < -1 || (size_t)(target + 1) >= packer->targets || packer->tallies[target + 1].pairs == 0) {
        PyErr_Format(PyExc_ValueError, "target %ld has no pairs in the step at hand", target);
        return NULL;
    }
    return &packer->tallies[target + 1];
}

/* Writes the frame's pairs and, where it holds only some rows of the step, copies these. */
static bool fill(const StepPacker *packer, const tally *taken, ClientStream *stream)
{
    const size_t pairs = taken->pairs, row_bytes = packer->row_bytes;
    const bool gather = taken->rows != packer->tokens;
    if (gather && !reserve(&stream->gathered, &stream->gathered_capacity, taken->rows * row_bytes))
        return false;
    int32_t row = -1;
    int64_t last = -1;
    for (size_t i = 0; i < pairs; i++) {
        int64_t position = packer->order[taken->begin + i], token = position / packer->top_k;
        if (token != last) {
            row++;
            last = token;
            if (gather)
                memcpy(stream->gathered + (size_t)row * row_bytes, packer->x + (size_t)token * row_bytes, row_bytes);
        }
        memcpy(stream->pairs + i * 4, packer->experts + position, 4);
        memcpy(stream->pairs + (pairs + i) * 4, &row, 4);
        memcpy(stream->pairs + (2 * pairs + i) * 4, packer->weights + position, 4);
    }
    stream->x = gather ? stream->gathered : packer->x;
    return true;
}

/* stage(target, stream, layer, epoch, frame, budget_ms) */
static PyObject *packer_stage(StepPacker *packer, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 6 || !Py_IS_TYPE(args[1], &ClientStreamType)) {
        PyErr_SetString(PyExc_TypeError, "stage(target, stream, layer, epoch, frame, budget_ms)");
        return NULL;
    }
    ClientStream *stream = (ClientStream *)args[1];
    const tally *taken = tally_of(packer, args[0]);
    if (taken == NULL)
        return NULL;
    frame_header header = {
        .kind = KIND_DISPATCH,
        .dtype = packer->dtype,
        .rows = taken->rows,
        .pairs = taken->pairs,
        .width = packer->width,
        .epoch = PyLong_AsUnsignedLongLong(args[3]),
    };
    if (PyErr_Occurred())
        return NULL;
    header.frame = PyLong_AsUnsignedLongLong(args[4]);
    if (PyErr_Occurred())
        return NULL;
    unsigned long layer = PyLong_AsUnsignedLong(args[2]), budget_ms = PyLong_AsUnsignedLong(args[5]);
    if (PyErr_Occurred())
        return NULL;
    if (layer > UINT32_MAX || budget_ms > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a layer or a budget beyond 32 bits");
        return NULL;
    }
    header.layer = (uint32_t)layer;
    header.first = (uint32_t)budget_ms;
    if (!stage_frame(stream, &header))
        return NULL;
    if (!fill(packer, taken, stream)) {
        stream->state = STREAM_IDLE;
        return NULL;
    }
    Py_RETURN_NONE;
}

/* positions(target) -> int64 bytes: its pairs in the step's flattened [tokens, top_k] */
static PyObject *packer_positions(StepPacker *packer, PyObject *target)
{
    const tally *taken = tally_of(packer, target);
    if (taken == NULL)
        return NULL;
    return PyBytes_FromStringAndSize((const char *)(packer->order + taken->begin),
                                     (Py_ssize_t)(taken->pairs * sizeof *packer->order));
}

/* -- the answers --------------------------------------------------------------------------------------------------- */

/* The rows of one answer, taken in the order of the step's tokens. */
typedef struct {
    const int64_t *order; /* of its pairs */
    uint32_t pairs, pair; /* how many, and the first that was not looked at yet */
    const char *row;      /* the next one */
} answer_rows;

/* Whether an answer has a row for this token, which becomes `*row`. Tokens must ascend. */
static bool next_row(const StepPacker *packer, answer_rows *answer, int64_t token, const char **row)
{
    const int64_t end = (token + 1) * packer->top_k; /* its pairs lie before */
    if (answer->pair == answer->pairs || answer->order[answer->pair] >= end)
        return false;
    while (answer->pair < answer->pairs && answer->order[answer->pair] < end)
        answer->pair++;
    *row = answer->row;
    answer->row += packer->row_bytes;
    return true;
}

static void add_up(StepPacker *packer, answer_rows *answers, size_t count, char *out, bool fresh)
{
    for (int64_t token = 0; token < packer->tokens; token++, out += packer->row_bytes) {
        bool any = false, add = !fresh;
        for (size_t i = 0; i < count; i++) {
            const char *row;
            if (!next_row(packer, &answers[i], token, &row))
                continue;
            if (!any && !fresh)
                take_row(packer->dtype, out, packer->sum, packer->width, false);
            take_row(packer->dtype, row, packer->sum, packer->width, add);
            any = add = true;
        }
        if (any)
            store_row(packer->dtype, packer->sum, out, packer->width);
        else if (fresh)
            memset(out, 0, packer->row_bytes);
    }
}

/* Takes the frames that were answered; how many. SIZE_MAX with an exception set. */
static size_t answered(const StepPacker *packer, PyObject *frames, size_t count, answer_rows *answers)
{
    size_t taken = 0;
    for (size_t i = 0; i < count; i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(frames, (Py_ssize_t)i);
        const ClientStream *stream = stream_of(item);
        if (stream == NULL)
            return SIZE_MAX;
        if (stream->in_use || stream->state != STREAM_ANSWERED)
            continue;
        const tally *sent = tally_of(packer, PyTuple_GET_ITEM(item, 0));
        if (sent == NULL)
            return SIZE_MAX;
        const frame_header *header = &stream->expected;
        if (header->rows != sent->rows || header->width != packer->width || header->dtype != packer->dtype) {
            PyErr_SetString(PyExc_ValueError, "the answer is not to a frame of the step at hand");
            return SIZE_MAX;
        }
        answers[taken++] = (answer_rows){
            .order = packer->order + sent->begin,
            .pairs = sent->pairs,
            .row = (const char *)stream->memory.buf + HEADER_BYTES,
        };
    }
    return taken;
}

/* combine(out, frames, fresh) */
static PyObject *packer_combine(StepPacker *packer, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "combine(out, frames, fresh)");
        return NULL;
    }
    char *out = PyLong_AsVoidPtr(args[0]);
    int fresh = PyObject_IsTrue(args[2]);
    if (PyErr_Occurred() ||
        !reserve_items(&packer->sum, &packer->sum_capacity, packer->width, sizeof *packer->sum))
        return NULL;
    PyObject *frames = PySequence_Fast(args[1], "combine takes a sequence of frames");
    if (frames == NULL)
        return NULL;
    size_t count = (size_t)PySequence_Fast_GET_SIZE(frames);
    answer_rows few[FRAMES_ON_STACK];
    answer_rows *answers = count > FRAMES_ON_STACK ? PyMem_Calloc(count, sizeof *answers) : few;
    size_t taken = SIZE_MAX;
    if (answers == NULL)
        PyErr_NoMemory();
    else
        taken = answered(packer, frames, count, answers);
    if (taken != SIZE_MAX)
        add_up(packer, answers, taken, out, fresh != 0);
    if (answers != few)
        PyMem_Free(answers);
    Py_DECREF(frames);
    return taken == SIZE_MAX ? NULL : Py_NewRef(Py_None);
}

/* -- the Python type ----------------------------------------------------------------------------------------------- */

static PyObject *packer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *rows, *bytes, *pairs;
    frame_limits limits;
    if (keywords != NULL && PyDict_GET_SIZE(keywords) > 0) {
        PyErr_SetString(PyExc_TypeError, "StepPacker takes positional arguments only");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOO", &rows, &bytes, &pairs) || !read_limits(rows, bytes, pairs, &limits))
        return NULL;
    StepPacker *packer = (StepPacker *)type->tp_alloc(type, 0);
    if (packer != NULL)
        packer->limits = limits;
    return (PyObject *)packer;
}

static void packer_dealloc(StepPacker *packer)
{
    PyMem_RawFree(packer->tallies);
    PyMem_RawFree(packer->order);
    PyMem_RawFree(packer->chosen);
    PyMem_RawFree(packer->left);
    PyMem_RawFree(packer->sum);
    Py_TYPE(packer)->tp_free((PyObject *)packer);
}

static PyMethodDef packer_methods[] = {
    {"route", (PyCFunction)(void (*)(void))packer_route, METH_FASTCALL, NULL},
    {"stage", (PyCFunction)(void (*)(void))packer_stage, METH_FASTCALL, NULL},
    {"positions", (PyCFunction)(void (*)(void))packer_positions, METH_O, NULL},
    {"combine", (PyCFunction)(void (*)(void))packer_combine, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject StepPackerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "expertmesh.routing.native._frames.StepPacker",
    .tp_basicsize = sizeof(StepPacker),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = packer_new,
    .tp_dealloc = (destructor)(void (*)(void))packer_dealloc,
    .tp_methods = packer_methods,
};
