"""Say what this machine lacks before anything is downloaded.

Run by the Makefile with whatever Python 3 it found, so the syntax is kept old.
"""

import os
import shutil
import sys
import sysconfig

NEEDED = (3, 11)


def problems():
    """Return one line for each thing that is missing."""
    if sys.version_info < NEEDED:
        yield (
            f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: "
            "name another one with `make PYTHON=/path/to/python3.11 ...`"
        )
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield "this Python can't make virtual environments (Debian: apt-get install python3-venv)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        yield (
            f"torch.compile needs a C++ compiler on the CPU and {compiler} was not found "
            "(Debian: apt-get install g++; or set CXX)"
        )
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        yield (
            f"torch.compile needs the headers of Python and {header} was not found "
            "(Debian: apt-get install python3-dev)"
        )


if __name__ == "__main__":
    found = list(problems())
    for problem in found:
        sys.stderr.write(f"calibatt: {problem}\n")
    sys.exit(1 if found else 0)
