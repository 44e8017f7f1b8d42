"""Compiled classes say where users find them, and what they are called with."""

cdef extern from * nogil:
    """
    #ifndef GUESTIO_NAMING
    #define GUESTIO_NAMING
    #include <Python.h>
    /* A static type's `__module__` and `__name__` are what its `tp_name` says, and its signature is
       at the start of `tp_doc`, from which its `__doc__` has been copied by now. Neither is copied
       here: they must be literals. */
    static inline void publish_type(PyObject *type, const char *name, const char *signature)
    {
        ((PyTypeObject *)type)->tp_name = name;
        ((PyTypeObject *)type)->tp_doc = signature;
    }
    #endif
    """
    void publish_type(object type, const char *name, const char *signature)
