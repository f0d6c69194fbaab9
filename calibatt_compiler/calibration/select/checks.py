"""Checks that finished inputs belong into one plan."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence

from calibatt_compiler.calibration.store.records import InputRecord
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import Sampler
from calibatt_compiler.plan.schema import CfgMode, FixedBy, TextPolicy

MOST_FACTOR = 1e6
"""By which the energies of a site may be raised: beyond, all are kept that were ever seen."""


def check_raised(record: InputRecord, raised: Mapping[str, float]) -> None:
    """Raise `OptionError` unless amounts are shares of mass, for sites of this input."""
    names = {size.name for size in record.sites}
    wrong = {
        name: value for name, value in raised.items() if not (name in names and 0 <= value <= 1)
    }
    if wrong:
        raise OptionError(
            "thresholds can't be raised so",
            expected=f"amounts in [0, 1] for sites such as {min(names)!r}",
            got=wrong,
            remedy="pass Validation.raised() of a plan of this run",
        )


def check_factors(record: InputRecord, raised: Mapping[str, float]) -> None:
    """Raise `OptionError` unless energies are raised by factors, of sites of this input."""
    names = {size.name for size in record.sites}
    wrong = {
        name: value
        for name, value in raised.items()
        if not (name in names and 1 <= value <= MOST_FACTOR)
    }
    if wrong:
        raise OptionError(
            "energies can't be raised so",
            expected=f"factors from 1 to {MOST_FACTOR:g} for sites such as {min(names)!r}",
            got=wrong,
            remedy="pass ZoneValidation.raised() of a plan of this run",
        )


def check_alike(first: InputRecord, other: InputRecord) -> None:
    """Raise `CalibrationError` unless model, sizes and steps of two inputs are the same."""
    names = ("model", "grid", "text", "block", "token_order", "timesteps", "positions")
    for name in (*names, "schedule_steps", "form", "step_groups"):
        expected, got = getattr(first, name), getattr(other, name)
        if expected != got:
            raise _unlike(first, other, f"{name} {expected}", f"{name} {got}")
    if first.fixed_by is not None and other.fixed_by is not None:
        differing = first.fixed_by.contradicts(other.fixed_by)
        if differing:
            raise _unlike(first, other, "tokens laid out alike", differing)
    sizes = {size.name: size for size in first.sites}, {size.name: size for size in other.sites}
    for name in sorted(sizes[0].keys() | sizes[1].keys()):
        if sizes[0].get(name) != sizes[1].get(name):
            raise _unlike(first, other, sizes[0].get(name), sizes[1].get(name))


def fixed_by_all(records: Sequence[InputRecord]) -> FixedBy | None:
    """Return what fixed the tokens of all inputs alike; None if it was not recorded of each."""
    found = [record.fixed_by for record in records if record.fixed_by is not None]
    return functools.reduce(FixedBy.agreed, found) if len(found) == len(records) else None


def _unlike(first: InputRecord, other: InputRecord, expected: object, got: object) -> Exception:
    return CalibrationError(
        f"inputs {first.name} and {other.name} don't make one plan",
        expected=expected,
        got=got,
        remedy="run all inputs with one size of video, sampler and number of steps; restart the "
        "run after a change",
    )


def sampler_of(record: InputRecord) -> Sampler:
    """Return the sampler of an input.

    Raises:
        CalibrationError: its timesteps go forwards and backwards.
    """
    pairs = list(zip(record.timesteps, record.timesteps[1:], strict=False))
    if not (all(a > b for a, b in pairs) or all(a < b for a, b in pairs)):
        raise CalibrationError(
            "the timesteps of the inputs neither fall nor rise throughout",
            expected="a sampler that goes from noise to video, or back",
            got=record.timesteps[:8],
            remedy="call the module in the order of its sampler, one input a `run.input()`",
        )
    return Sampler(name=record.scheduler, timesteps=record.timesteps, sigmas=record.sigmas)


def text_policy_of(record: InputRecord) -> TextPolicy:
    """Return the text policy of the plan of an input."""
    if record.text is None or not any(s.query_length > record.video for s in record.sites):
        return "none"
    return "dense_first" if record.text == "first" else "dense_last"


def inputs_digest(about: Sequence[object], arguments: object) -> str:
    """SHA-256 (hex) over what each input was and what all have in common, as JSON values."""
    content = {"inputs": list(about), "arguments": arguments}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def guidance_of(records: Sequence[InputRecord], family: CfgMode) -> CfgMode:
    """How guidance was run: as observed; what the family does only where records do not say."""
    if any(record.batched for record in records):
        return "batched"
    guided = [record for record in records if record.guided]
    if not guided:
        return family if family == "embedded" else "none"
    return family if all(record.batched is None for record in guided) else "separate"
