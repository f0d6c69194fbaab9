"""`python -m calibatt_compiler`: the command `calibatt`, as torchrun starts it."""

from __future__ import annotations

from calibatt_compiler.cli import main

if __name__ == "__main__":
    main()
