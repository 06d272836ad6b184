#include "native.h"

PyObject *wire_error;

bool read_limits(PyObject *max_rows, PyObject *max_bytes, PyObject *max_pairs_per_row, frame_limits *limits)
{
    limits->max_rows = PyLong_AsUnsignedLongLong(max_rows);
    if (PyErr_Occurred())
        return false;
    limits->max_bytes = PyLong_AsUnsignedLongLong(max_bytes);
    if (PyErr_Occurred())
        return false;
    limits->max_pairs_per_row = PyLong_AsUnsignedLongLong(max_pairs_per_row);
    if (PyErr_Occurred())
        return false;
    if (limits->max_bytes > PY_SSIZE_T_MAX / 2)
        limits->max_bytes = PY_SSIZE_T_MAX / 2;
    if (limits->max_pairs_per_row > UINT32_MAX)
        limits->max_pairs_per_row = UINT32_MAX;
    return true;
}

bool reserve(char **memory, size_t *capacity, size_t bytes)
{
    if (bytes <= *capacity)
        return true;
    PyMem_RawFree(*memory);
    *memory = PyMem_RawMalloc(bytes);
    *capacity = *memory == NULL ? 0 : bytes;
    if (*memory == NULL)
        PyErr_NoMemory();
    return *memory != NULL;
}

PyObject *new_buffer(size_t bytes, Py_buffer *view)
{
    PyObject *buffer = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)bytes);
    if (buffer != NULL && PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE) < 0)
        Py_CLEAR(buffer);
    return buffer;
}

/* parse_header(data, max_rows, max_bytes, max_pairs_per_row) -> the ten fields, or None for what is no such header */
static PyObject *parse_header_fields(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer data;
    PyObject *rows, *bytes, *pairs;
    frame_limits limits;
    frame_header header;
    if (!PyArg_ParseTuple(args, "y*OOO", &data, &rows, &bytes, &pairs))
        return NULL;
    bool ok = false, limited = read_limits(rows, bytes, pairs, &limits);
    if (limited && data.len >= HEADER_BYTES)
        ok = parse_header(data.buf, &limits, &header);
    PyBuffer_Release(&data);
    if (!limited)
        return NULL;
    if (!ok)
        Py_RETURN_NONE;
    return Py_BuildValue("(iiIIIIKKII)", header.kind, header.dtype, header.layer, header.rows, header.pairs,
                         header.width, (unsigned long long)header.epoch, (unsigned long long)header.frame, header.first,
                         header.second);
}

static PyMethodDef functions[] = {
    {"exchange", (PyCFunction)(void (*)(void))exchange, METH_FASTCALL, NULL},
    {"count_experts", (PyCFunction)(void (*)(void))count_experts, METH_FASTCALL, NULL},
    {"add_parts", (PyCFunction)(void (*)(void))add_parts, METH_FASTCALL, NULL},
    {"parse_header", parse_header_fields, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_frames",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__frames(void)
{
    PyObject *errors = PyImport_ImportModule("expertmesh.errors");
    if (errors == NULL)
        return NULL;
    wire_error = PyObject_GetAttrString(errors, "WireError");
    Py_DECREF(errors);
    PyObject *module = wire_error == NULL ? NULL : PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (PyModule_AddType(module, &ClientStreamType) < 0 || PyModule_AddType(module, &ServerStreamType) < 0 ||
        PyModule_AddType(module, &StepPackerType) < 0 || PyModule_AddIntConstant(module, "IDLE", STREAM_IDLE) < 0 ||
        PyModule_AddIntConstant(module, "WAITING", STREAM_WAITING) < 0 ||
        PyModule_AddIntConstant(module, "ANSWERED", STREAM_ANSWERED) < 0 ||
        PyModule_AddIntConstant(module, "REFUSED", STREAM_REFUSED) < 0 ||
        PyModule_AddIntConstant(module, "BROKEN", STREAM_BROKEN) < 0 ||
        PyModule_AddIntConstant(module, "OVERDUE", STREAM_OVERDUE) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
