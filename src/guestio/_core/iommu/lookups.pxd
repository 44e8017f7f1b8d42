from guestio._core.iommu.intervals cimport IntervalMap


cdef class Lookups:
    cdef readonly IntervalMap _map
