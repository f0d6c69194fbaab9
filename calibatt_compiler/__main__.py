"""`python -m calibatt_compiler`: the command `calibatt`, as torchrun starts it."""

from __future__ import annotations

import os
import sys


def leave_current_folder() -> None:
    """Take the current folder, which `-m` puts first, off `sys.path`: its files are data.

    It stays where this package itself was found there, in a checkout that is not installed.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()] and sys.path[0] != home:
        del sys.path[0]


if __name__ == "__main__":
    leave_current_folder()
    from calibatt_compiler.cli import main

    main()
