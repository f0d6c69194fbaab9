"""Draws programs with effects for a number of minutes; prints each that comes out wrong, shortened.

python tests/campaigns/effects.py --minutes 5 --seed 7
"""

from __future__ import annotations

import logging
import random
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from campaign import finish, parser_of
from effect_programs import Program, difference
from effect_statements import FLOWING, STATEMENTS


def draw(generator: random.Random) -> Program:
    """Draw a program."""
    names = generator.choice((sorted(STATEMENTS), FLOWING))
    attending = [name for name in names if name.startswith("attend")]
    found = [generator.choice(names) for _ in range(generator.randint(1, 7))]
    found.insert(generator.randint(0, len(found)), generator.choice(attending))
    return Program(
        tuple(found),
        plan=generator.choice(("none", "some", "all", "all", "full")),
        order=generator.choice(("raster", "2x2x3")),
        alias=generator.random() < 0.3,
        seed=generator.randrange(1000),
    )


def shortest(program: Program, wrong: str, **options: Any) -> Program:
    """Drop statements as long as the program still fails alike."""
    for index in range(len(program.statements)):
        fewer = program.statements[:index] + program.statements[index + 1 :]
        smaller = replace(program, statements=fewer)
        if (outcome(smaller, **options) or "").split()[:1] == wrong.split()[:1]:
            return shortest(smaller, wrong, **options)
    return program


def outcome(program: Program, **options: Any) -> str | None:
    """Return what is wrong with a program: a difference, or what it raises."""
    try:
        return difference(program, **options)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def without_inductor() -> Any:
    """Run graphs as they are rewritten."""
    return mock.patch(
        "calibatt_compiler.backend._inductor", lambda gm, inputs, settings: gm.forward
    )


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    logging.getLogger("calibatt").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    generator, counts = random.Random(arguments.seed), Counter[str]()
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        program = draw(generator)
        inductor = generator.random() < 0.05
        if inductor:  # it drops random numbers that nobody reads, as stock Inductor does
            kept = tuple(name for name in program.statements if name != "unused_noise")
            program = replace(program, statements=kept)
        with nullcontext() if inductor else without_inductor():
            wrong = outcome(program)
            counts["through Inductor" if inductor else "as rewritten"] += 1
            counts["cases"] += 1
            if wrong is not None:
                counts["failures"] += 1
                print(f"WRONG {shortest(program, wrong)}\n  {wrong}", flush=True)
    raise SystemExit(finish("effects", arguments, counts, arguments.minutes))


if __name__ == "__main__":
    main()
