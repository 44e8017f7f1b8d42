/* libFuzzer as a Python module. What the compiled core covers, the compiler counts; what Python
   covers, lines of the package, is counted here and handed to libFuzzer as if it had been compiled.

   It is loaded before everything else (LD_PRELOAD), so that the core finds libFuzzer's functions
   here and not the empty ones of a sanitizer's runtime. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*callback)(const uint8_t *, size_t));
void __sanitizer_cov_8bit_counters_init(uint8_t *start, uint8_t *stop);
void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop);

enum { LINES = 1 << 14 };
static uint8_t line_counts[LINES];
static uintptr_t line_numbers[LINES][2]; /* what libFuzzer takes for addresses, and flags */
static PyObject *target;

/* Files are told apart by the identity of their name, which all code of a file shares. */
static int is_ours(PyObject *name)
{
    static PyObject *last_ours, *last_other;
    if (name == last_ours || name == last_other)
        return name == last_ours;
    const char *path = PyUnicode_AsUTF8(name);
    if (!path) {
        PyErr_Clear();
        return 0;
    }
    int ours = strstr(path, "/guestio/") != NULL;
    PyObject **kept = ours ? &last_ours : &last_other;
    Py_INCREF(name);
    Py_XDECREF(*kept);
    *kept = name;
    return ours;
}

static int count_line(PyObject *unused, PyFrameObject *frame, int event, PyObject *argument)
{
    (void)unused, (void)argument;
    if (event != PyTrace_LINE)
        return 0;
    PyCodeObject *code = PyFrame_GetCode(frame);
    if (is_ours(code->co_filename)) {
        /* Hashes of strings are the same in every run: PYTHONHASHSEED is set. */
        uint64_t mixed = (uint64_t)PyObject_Hash(code->co_filename);
        mixed = (mixed + (uint64_t)code->co_firstlineno) * 0x9e3779b97f4a7c15;
        mixed = (mixed ^ mixed >> 29) + (uint64_t)PyFrame_GetLasti(frame);
        mixed *= 0xbf58476d1ce4e5b9;
        line_counts[mixed >> 50]++;
    }
    Py_DECREF(code);
    return 0;
}

static int run_one(const uint8_t *data, size_t size)
{
    PyObject *done = PyObject_CallFunction(target, "y#", (const char *)data, (Py_ssize_t)size);
    if (!done) {
        PyErr_Print();
        fflush(NULL);
        abort(); /* libFuzzer keeps the input */
    }
    Py_DECREF(done);
    return 0;
}

/* fuzz(target, arguments): calls target(bytes) until libFuzzer ends the process. */
static PyObject *fuzz(PyObject *module, PyObject *arguments)
{
    PyObject *list;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO!", &target, &PyList_Type, &list))
        return NULL;
    Py_INCREF(target);
    int argc = (int)PyList_GET_SIZE(list);
    char **argv = calloc((size_t)argc + 1, sizeof *argv);
    for (int i = 0; i < argc; i++) {
        const char *argument = PyUnicode_AsUTF8(PyList_GET_ITEM(list, i));
        if (!argument)
            return NULL;
        argv[i] = strdup(argument);
    }
    for (uintptr_t i = 0; i < LINES; i++)
        line_numbers[i][0] = i + 1;
    __sanitizer_cov_8bit_counters_init(line_counts, line_counts + LINES);
    __sanitizer_cov_pcs_init(line_numbers[0], line_numbers[LINES]);
    PyEval_SetTrace(count_line, NULL);
    return PyLong_FromLong(LLVMFuzzerRunDriver(&argc, &argv, run_one));
}

static PyMethodDef functions[] = {{"fuzz", fuzz, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "libfuzzer", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_libfuzzer(void) { return PyModule_Create(&definition); }
