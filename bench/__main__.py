"""The benchmarks by name: `python -m bench block --quick`."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Run one benchmark with the rest of the arguments, or say which there are."""
    known = {path.stem.replace("_", "-"): path for path in sorted(HERE.glob("[a-z]*.py"))}
    if arguments and arguments[0] in known:
        sys.argv = arguments
        runpy.run_module(f"bench.{known[arguments[0]].stem}", run_name="__main__")
        return 0
    helping = not arguments or arguments[0] in {"-h", "--help"}
    out = sys.stdout if helping else sys.stderr
    if not helping:
        print(f"no benchmark {arguments[0]!r}", file=out)
    print("Usage: ./run bench NAME [ARGUMENT...]; NAME --help tells more.\n", file=out)
    for name, path in known.items():
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        print(f"  {name:12} {about.splitlines()[0] if about else ''}", file=out)
    return 0 if helping else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
