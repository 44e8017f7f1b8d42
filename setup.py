"""Declares the compiled core and its variants; all else about the package is in pyproject.toml.

GUESTIO_CORE names a variant: traits joined by "-", as in "asan-tiny". Variants share the C files
that Cython makes; only macros, flags and the compiler differ. `./run` builds each into a tree of
its own below build/variants; what is installed is always the normal core.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from Cython.Build import cythonize
from setuptools import Extension, setup


class Trait(NamedTuple):
    """What a word in a variant's name means."""

    flags: tuple[str, ...] = ()
    macros: tuple[str, ...] = ()
    compiler: str = ""


SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero"
TRAITS = {
    # The smallest legal capacities, so that short runs reach every border.
    "tiny": Trait(macros=("GUESTIO_TINY",)),
    "o1": Trait(flags=("-O1",)),
    "clang": Trait(flags=("-O2",), compiler="clang"),
    # Slabs come from malloc, so that the sanitizer knows their bounds.
    "asan": Trait(
        flags=("-O1", "-fno-omit-frame-pointer", SANITIZERS, "-fno-sanitize-recover=all"),
        macros=("GUESTIO_HEAP_SLABS",),
    ),
    # Cython calls functions through pointers of slightly other types, as CPython itself does.
    "fuzz": Trait(
        flags=("-O1", "-fsanitize=fuzzer-no-link", "-fno-sanitize=function"), compiler="clang"
    ),
}

CORE = os.environ.get("GUESTIO_CORE", "normal")
traits = [] if CORE == "normal" else [TRAITS[word] for word in CORE.split("-")]
if traits and not any(argument.startswith("--build-lib") for argument in sys.argv):
    sys.exit(f"GUESTIO_CORE={CORE}: `./run test --core {CORE}` builds and tests this variant")
for compiler in (trait.compiler for trait in traits if trait.compiler):
    launcher = "ccache " if os.environ.get("CC", "").startswith("ccache ") else ""
    os.environ["CC"] = launcher + compiler

flags = [flag for trait in traits for flag in trait.flags]
macros = [macro for trait in traits for macro in trait.macros]
if traits:
    macros += ["GUESTIO_CHECKS"]

SOURCES = Path("src")
CAPACITIES = SOURCES / "guestio/_core/base/capacity.h"

EXTENSIONS = [
    Extension(
        ".".join(source.relative_to(SOURCES).with_suffix("").parts),
        [str(source)],
        include_dirs=[str(CAPACITIES.parent)],
        depends=[str(CAPACITIES)],
        define_macros=[("GUESTIO_CORE", f'"{CORE}"'), *((macro, None) for macro in macros)],
        extra_compile_args=["-O3", "-fno-strict-aliasing", "-Wno-unused-function", *flags],
        extra_link_args=[flag for flag in flags if flag.startswith("-fsanitize=")],
    )
    for source in sorted(SOURCES.rglob("*.pyx"))
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
