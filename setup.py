"""Declares the compiled core; everything else about the package is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

EXTENSIONS = [
    Extension(
        f"guestio._core.{name}",
        [f"src/guestio/_core/{name}.pyx"],
        extra_compile_args=["-O3", "-fno-strict-aliasing", "-Wno-unused-function"],
    )
    for name in (
        "access",
        "areas",
        "bitmap",
        "blockio",
        "border",
        "chain",
        "driver",
        "eviction",
        "inflight",
        "intake",
        "intervals",
        "iotlbfront",
        "iotlbwire",
        "leases",
        "load",
        "mapping",
        "misses",
        "questions",
        "requests",
        "ring",
        "slices",
        "tree",
        "vector",
    )
]

setup(
    ext_modules=cythonize(
        EXTENSIONS,
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "cdivision": True,
            # Methods that Python itself makes check what they are called on; Cython's do not.
            "binding": False,
            "embedsignature": True,
            "embedsignature.format": "clinic",
        },
    )
)
