"""Plan files whose checksums fit what they hold, and whose content is refused all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_files import decode_all

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.plan import Plan


def test_forging_is_faithful(forge: Callable[..., Path], make_plan: Callable[..., Plan]):
    """Without an edit the forged file is a good one: the refusals below are for the edit."""
    assert Plan.load(forge(lambda document, tensors: None)) == make_plan()


def put(*steps: Any) -> Callable[[Any, Any], None]:
    """Return an edit: `put("sites", 0, "heads", 3)` sets document["sites"][0]["heads"] = 3."""
    *way, key, value = steps

    def edit(document: Any, tensors: Any) -> None:
        for part in way:
            document = document[part]
        document[key] = value

    return edit


def drop(key: str) -> Callable[[Any, Any], None]:
    """Return an edit that removes a field."""

    def edit(document: Any, tensors: Any) -> None:
        del document[key]

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (put("schema_version", 3), "schema_version 3"),
        (put("schema_version", 1), "schema_version 1"),
        (put("schema_version", "2"), "schema_version '2'"),
        (put("schema_version", None), "schema_version None"),
        (put("requires", ["holograms"]), r"features \['holograms'\]"),
        (put("requires", ["holograms", 7]), r"features \['7', 'holograms'\]"),
        (put("requires", 7), "does not parse"),
        (put("requires", [{}]), "does not parse"),
        (drop("schema_version"), "does not parse"),
        (drop("requires"), "does not parse"),
        (lambda document, tensors: "[1, 2]", "does not parse"),
        (lambda document, tensors: "{", "does not parse"),
        (lambda document, tensors: "[" * 100_000, "does not parse"),
        (lambda document, tensors: '{"schema_version": ' + "9" * 5000 + "}", "does not parse"),
    ],
)
def test_another_schema_is_refused(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None], problem: str
):
    with pytest.raises(PlanFormatError, match=problem):
        Plan.load(forge(edit))


@pytest.mark.parametrize(
    "edit",
    [
        put("sampler", "timesteps", 1, float("nan")),
        put("sampler", "timesteps", 0, float("inf")),
        put("sampler", "timesteps", 1, "700"),
        put("sampler", "timesteps", 1, 1000.0),
        put("sampler", "timesteps", []),
        put("sampler", "sigmas", [1.0]),
        put("sampler", "sigmas", [1.0, float("nan"), 0.0]),
        put("sites", 0, "density", 0, float("nan")),
        put("sites", 0, "density", 0, -0.25),
        put("sites", 0, "density", 0, 1.5),
        put("sites", 0, "density", []),
        put("thresholds", {"A": float("nan")}),
        put("thresholds", {"A": "0.8"}),
        put("quality", {"psnr": float("-inf")}),
        put("inputs", "count", -1),
        put("grid", [3, 5]),
        put("grid", [3, 5, 0]),
        put("grid", [3, 5, 10.5]),
        put("grid", [3, 5, 1 << 60]),
        put("grid", [3, 5, 10**30]),
        put("token_order", "spiral"),
        put("cfg", "unheard-of"),
        put("model", {}),
        put("sites", []),
        put("sites", {}),
        put("sites", 1, "name", "blocks.0.attn1"),
        put("sites", 0, "name", ""),
        put("sites", 0, "name", 3),
        put("sites", 0, "steps", [0, 1]),
        put("sites", 0, "steps", [0, 1, 3]),
        put("sites", 0, "steps", [0, 1, -1]),
        put("sites", 0, "steps", [0, 1, 1]),
        put("sites", 0, "patterns", 1 << 62),
        put("sites", 0, "digests", []),
        put("sites", 0, "digests", ["0" * 64, "1" * 64]),
        put("sites", 0, "digests", 1, "0" * 63),
        put("sites", 0, "digests", 1, "G" * 64),
        put("sites", 0, "head_forms", "rows"),
        put("sites", 0, "holograms", []),
        put("unheard_of", 1),
        drop("sampler"),
        *(
            put("sites", 0, field, value)
            for field in (
                "heads",
                "head_dim",
                "query_length",
                "key_length",
                "block_m",
                "block_n",
                "patterns",
            )
            for value in (0, -1, -(2**31), float("nan"), "2")
        ),
        *(
            put("sites", 0, field, 1 << 62)
            for field in ("heads", "head_dim", "query_length", "key_length", "block_m", "block_n")
        ),
        put("sites", 0, "block_m", 24),
    ],
)
def test_values_out_of_range_are_refused(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None]
):
    with pytest.raises(PlanFormatError, match="holds values out of range") as caught:
        Plan.load(forge(edit))
    assert caught.value.remedy


def tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Any, dict[str, Any]], None]:
    """Return an edit of one tensor."""

    def edit(document: Any, tensors: dict[str, Any]) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    return edit


SITE = "blocks.0.attn1"


@pytest.mark.parametrize(
    "edit",
    [
        put("sites", 0, "name", "elsewhere"),
        lambda document, tensors: document["sites"][0].update(
            query_length=1 << 24, key_length=1 << 24
        ),
        tensor(SITE, lambda code: code.astype(np.int8)),
        tensor(SITE, lambda code: code.astype(np.float32)),
        tensor(SITE, lambda code: code.astype(np.int64)),
        tensor(SITE, lambda code: code[:-1]),
        tensor(SITE, lambda code: code[:0]),
        tensor(SITE, lambda code: np.append(code, code[:1])),
        tensor(SITE, lambda code: code.reshape(1, -1)),
        lambda document, tensors: tensors.update(extra=np.zeros(3, np.uint8)),
        lambda document, tensors: tensors.clear(),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None]
):
    with pytest.raises(PlanFormatError, match="tensors that don't fit its sites"):
        Plan.load(forge(edit))


@pytest.mark.parametrize(
    "edit",
    [
        put("sites", 0, "heads", 3),
        put("sites", 0, "query_length", 151),
        put("sites", 0, "query_length", 161),
        put("sites", 0, "key_length", 1000),
        put("sites", 0, "key_length", 1 << 24),
        put("sites", 0, "block_m", 16),
        put("sites", 0, "digests", 1, "0" * 64),
        put("sites", 0, "density", 1, 0.125),
        tensor(SITE, lambda code: code ^ np.uint8(1)),
        tensor(SITE, lambda code: code[::-1]),
        tensor(SITE, lambda code: code * 0),
    ],
)
def test_patterns_that_are_not_those_of_the_record_are_refused_when_decoded(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None]
):
    """No damage, for which there are checksums, but a file that contradicts itself."""
    plan = Plan.load(forge(edit))
    with pytest.raises(PlanError, match=r"is not what was stored|wrong shape|past the end|no kept"):
        decode_all(plan)
    tuple(plan.sites["blocks.1.attn1"].patterns)


def entry(pattern: int, *value: Any) -> Callable[[Any], None]:
    """Return an edit of the index: the arrays of one pattern."""

    def relist(index: Any) -> None:
        index[SITE]["patterns"][pattern] = list(value)

    return relist


@pytest.mark.parametrize(
    ("relist", "problem"),
    [
        (lambda index: "{", "index does not parse"),
        (lambda index: "[]", "index does not parse"),
        (lambda index: index[SITE].pop("sha256") and None, "index does not parse"),
        (lambda index: index[SITE].update(more=1), "index does not parse"),
        (entry(0, ["bits", "magic", 3]), "index does not parse"),
        (entry(0, ["bits", "raw", -1]), "index does not parse"),
        (entry(0, ["bits", "raw", 1 << 60]), "index does not parse"),
        (entry(0, ["bits", "raw"]), "index does not parse"),
        (entry(0), "don't fit its sites"),
        (entry(0, ["bits", "raw", 1 << 40]), "don't fit its sites"),
        (entry(0, ["kept_weights", "raw", 3]), "don't fit its sites"),
        (entry(0, ["bits", "raw", 3], ["bits", "raw", 3]), "don't fit its sites"),
        (entry(0, ["repetitive", "raw", 3], ["bits", "raw", 3]), "don't fit its sites"),
        (lambda index: index[SITE]["patterns"].pop() and None, "don't fit its sites"),
        (lambda index: index.pop(SITE) and None, "don't fit its sites"),
        (lambda index: index[SITE].update(sha256="0" * 64), "checksum of 'blocks.0.attn1'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    forge: Callable[..., Path], relist: Callable[[Any], str | None], problem: str
):
    with pytest.raises(PlanFormatError, match=problem):
        Plan.load(forge(lambda document, tensors: None, relist))


def test_codes_of_another_kind_are_refused_when_decoded(forge: Callable[..., Path]):
    def swap(index: Any) -> None:
        for item in index[SITE]["patterns"]:
            item[0][1] = {"raw": "gaps", "gaps": "deflate", "deflate": "gaps"}[
                item[0][1].removesuffix("/previous")
            ]

    plan = Plan.load(forge(lambda document, tensors: None, swap))
    for index in range(3):
        with pytest.raises(PlanFormatError, match=f"pattern {index} of site 'blocks.0.attn1' in"):
            plan.sites[SITE].patterns[index]
