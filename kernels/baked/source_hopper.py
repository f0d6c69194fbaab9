"""Gluon source for one cover: the function that tells the Hopper kernel's loading warp its keys.

The kernel itself is not generated: it takes this function as a compile-time argument. See
`transport.literal_block` for how its result is read.
"""

from __future__ import annotations

from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.kernels.baked.source_templates import (
    GLUON,
    check_key_blocks,
    choose_form,
    docstring,
    form_function,
    wrap,
)
from calibatt_compiler.plan.pattern import BlockPattern

ENTRY_POINT = "literals"
"""Name of the function in generated source."""

_IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
"""

_SIGNATURE = """\
@gluon.jit
def literals(head, row):
"""


def generate_hopper(cover: Cover, pattern: BlockPattern) -> str:
    """Write the key blocks of `cover`.

    Args:
        cover: the mask in symbolic form.
        pattern: its lengths and block sizes; the bits are not looked at.

    Returns:
        Source of a module whose `literals(head, row)` returns, for each interval k of a row, the
        number of kept blocks before it (left out for the first) and the number that turns a
        block's rank among the kept ones into a key block.

    Raises:
        KernelError: more key blocks than an interval's bounds can name.
    """
    check_key_blocks(cover)
    parts = [docstring(cover, pattern), _IMPORTS]
    for index, form in enumerate(cover.forms):
        parts.append("\n" + form_function(index, form, cover, GLUON))
    parts.append("\n" + _SIGNATURE + "".join(choose_form(cover)) + _ranks(cover.max_intervals))
    return "\n".join(parts)


def _ranks(intervals: int) -> str:
    """Lay the intervals end to end: blocks before each, and what turns a rank into a block."""
    lines = [
        "    # A run holds the start of its interval and, 16 bits up, the end.\n",
        "    # Key block = rank among the kept blocks + shift of its interval.\n",
        "    shift_0 = run_0 & 0xFFFF\n",
        "    blocks = (run_0 >> 16) - shift_0\n",
    ]
    names = ["shift_0"]
    for k in range(1, intervals):
        lines += [
            f"    start = run_{k} & 0xFFFF\n",
            f"    before_{k} = blocks\n",
            f"    shift_{k} = start - blocks\n",
            f"    blocks += (run_{k} >> 16) - start\n",
        ]
        names += [f"before_{k}", f"shift_{k}"]
    return "".join(lines) + wrap("    return (", names, ",)", "        ")
