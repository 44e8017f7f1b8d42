"""What a range that is looked up consists of: a list of its parts, and what was found there."""

from cpython.exc cimport PyErr_NoMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from guestio._core.base.checks cimport span_length, u64
from guestio._core.base.capacity cimport PIECES_INSIDE

cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        PyObject *(*tp_alloc)(PyTypeObject *, Py_ssize_t) except NULL
    void PyTuple_SET_ITEM(PyObject *, Py_ssize_t, PyObject *)

cdef extern from *:
    void drop_reference "Py_DECREF"(PyObject *)


ctypedef int Outcome

cdef enum:
    OK = 0
    MISS = 1
    ACCESS_FAIL = 2
    FRAGMENTED = 3


cdef struct Piece:
    # A part of a range that was looked up, inclusive, and what was found there.
    u64 first
    u64 last
    u64 target
    u64 perm
    Outcome outcome


cdef struct Pieces:
    # A list of them that needs no memory of its own while it is short.
    Piece *item
    size_t count
    size_t room
    Piece inside[PIECES_INSIDE]


cdef inline void open_pieces(Pieces *pieces) noexcept:
    pieces.item, pieces.count, pieces.room = pieces.inside, 0, PIECES_INSIDE


cdef inline int add_piece(
    Pieces *pieces, u64 first, u64 last, u64 target, u64 perm, Outcome outcome
) except -1:
    cdef Piece *grown
    if pieces.count == pieces.room:
        grown = <Piece *>realloc(
            NULL if pieces.item is pieces.inside else pieces.item,
            2 * pieces.room * sizeof(Piece),
        )
        if grown is NULL:
            PyErr_NoMemory()
        if pieces.item is pieces.inside:
            memcpy(grown, pieces.inside, sizeof(pieces.inside))
        pieces.item, pieces.room = grown, 2 * pieces.room
    pieces.item[pieces.count] = Piece(first, last, target, perm, outcome)
    pieces.count += 1
    return 0


cdef inline void close_pieces(Pieces *pieces) noexcept:
    if pieces.item is not pieces.inside:
        free(pieces.item)


cdef inline object make_range(object cls, u64 base, u64 first, u64 last):
    """``cls(base, length of [first, last])`` of a NamedTuple, past its slow constructor."""
    cdef object number = base
    cdef object length = span_length(first, last)
    cdef PyObject *pair = (<PyTypeObject *>cls).tp_alloc(<PyTypeObject *>cls, 2)
    Py_INCREF(number)
    PyTuple_SET_ITEM(pair, 0, <PyObject *>number)
    Py_INCREF(length)
    PyTuple_SET_ITEM(pair, 1, <PyObject *>length)
    result = <object>pair
    # tp_alloc returned a reference of its own, `result` took another.
    drop_reference(pair)
    return result
