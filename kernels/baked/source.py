"""Source for one cover: the function that tells a kernel the key blocks of a row, as literals.

The kernel itself is not generated: it takes this function as a compile-time argument, in the place
of a load from the table of the same blocks, so both give the same bits. See `literal_block` of
`hopper.transport` and `kept_block` of `portable.kernel` for how its result is read.
"""

from __future__ import annotations

from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.kernels.baked.source_templates import (
    GLUON,
    TRITON,
    check_key_blocks,
    choose_form,
    docstring,
    form_function,
    wrap,
)
from calibatt_compiler.kernels.request import Target
from calibatt_compiler.plan.pattern import BlockPattern

ENTRY_POINT = "literals"
"""Name of the function in generated source."""

_IMPORTS = {
    GLUON: """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
""",
    TRITON: """\
import triton
import triton.language as tl
""",
}


def generate(cover: Cover, pattern: BlockPattern, target: Target) -> str:
    """Write the key blocks of `cover`.

    Args:
        cover: the mask in symbolic form.
        pattern: its lengths and block sizes; the bits are not looked at.
        target: for which kernel.

    Returns:
        Source of a module whose `literals(head, row)` returns, for each interval k of a row, the
        number of kept blocks before it (left out for the first) and the number that turns a
        block's rank among the kept ones into a key block.

    Raises:
        KernelError: more key blocks than an interval's bounds can name.
    """
    check_key_blocks(cover)
    dialect = GLUON if target == "hopper" else TRITON
    parts = [docstring(cover, pattern), _IMPORTS[dialect]]
    for index, form in enumerate(cover.forms):
        parts.append("\n" + form_function(index, form, cover, dialect))
    body = "".join(choose_form(cover)) + _ranks(cover.max_intervals)
    parts.append(f"\n@{dialect.jit}\ndef {ENTRY_POINT}(head, row):\n{body}")
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
