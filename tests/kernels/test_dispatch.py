"""Which kernel serves what, on GPUs that are not here: a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.dispatch import (
    DENSE_FROM,
    FIXED_FROM,
    Choice,
    DeviceFacts,
    EnergyRequest,
    choose,
    choose_energy,
)
from calibatt_compiler.kernels.request import AnyPattern, KernelRequest, KernelSettings
from calibatt_compiler.plan import AnchorRows, BlockPattern, SitePatterns
from calibatt_compiler.plan.stored import PatternOutline
from calibatt_compiler.plan.zones import ZonePattern

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OTHER_GPUS = [80, 86, 89, 100, 120]
COPYING = {"copies": AnchorRows((1, 8, 8), 3)}
SPECIAL = "generated source has no weights and no pooled keys yet"


def outline(
    block: tuple[int, int] = (128, 128), tokens: int = FIXED_FROM, **more: Any
) -> PatternOutline:
    return PatternOutline(2, tokens, tokens, *block, **more)


def zones(block: tuple[int, int] = (128, 128), tokens: int = FIXED_FROM) -> ZonePattern:
    """One group of rows, one run: it keeps all."""
    arrays = {
        "group_rows": np.array([-(-tokens // block[0])], np.int32),
        "diagonal": np.zeros(1, np.uint8),
        "leads": np.zeros(1, np.int32),
        "counts": np.ones(1, np.int32),
        "cuts": np.zeros(0, np.int32),
        "octaves": np.zeros(1, np.uint8),
    }
    return ZonePattern(1, tokens, tokens, *block, **arrays)


def ask(pattern: AnyPattern, **settings: Any) -> KernelRequest[AnyPattern]:
    given = {"device": torch.device("cuda"), "dtype": BF16, "head_dim": 128, **settings}
    return KernelRequest(pattern, **given)


def test_a_cpu_has_one_kernel_and_the_reference_serves_anything() -> None:
    for dtype in (FP64, FP32, BF16, FP16):
        for lowering in ("baked", "table"):
            for more in ({}, {"weighted": True}, {"pooled": 2}, COPYING):
                request = ask(outline(**more), lowering=lowering, dtype=dtype, head_dim=300)
                assert choose(request, DeviceFacts("cpu")).kernel == "native-cpu"
        reference = ask(outline(), lowering="reference", dtype=dtype, head_dim=300)
        for facts in (DeviceFacts("meta"), DeviceFacts("cuda", 75), DeviceFacts("cuda", 90)):
            assert choose(reference, facts) == Choice("reference")


@pytest.mark.parametrize("arch", OTHER_GPUS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("head_dim", [1, 96, 128, 256])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (128, 64)])
def test_other_gpus_take_the_portable_kernels_and_miss_none(
    arch: int, dtype: torch.dtype, head_dim: int, block: tuple[int, int]
) -> None:
    facts = DeviceFacts("cuda", arch)
    for lowering, kernel in (("table", "triton-table"), ("baked", "triton-baked")):
        request = ask(outline(block), lowering=lowering, dtype=dtype, head_dim=head_dim)
        assert choose(request, facts) == Choice(kernel)


@pytest.mark.parametrize(
    ("settings", "pattern", "kernel", "reason"),
    [
        ({}, {}, "hopper", None),
        ({"dtype": FP16, "head_dim": 64}, {}, "hopper", None),
        ({}, {"block": (128, 64)}, "hopper", None),
        ({}, COPYING, "hopper", None),
        ({"hopper": False}, {}, "triton", None),
        ({"dtype": FP32}, {}, "triton", "it takes bfloat16 and float16, not torch.float32"),
        ({"head_dim": 96}, {}, "triton", "it takes head dims 64 and 128, not 96"),
        (
            {},
            {"block": (64, 64)},
            "triton",
            "it takes blocks of 128x128 and 128x64 tokens, not 64x64",
        ),
        ({}, {"tokens": 1 << 22}, "triton", "its tables name at most 32767 blocks a side"),
    ],
)
@pytest.mark.parametrize("lowering", ["table", "baked"])
def test_hopper_takes_its_own_kernels_or_says_why_not(
    settings: dict[str, Any],
    pattern: dict[str, Any],
    kernel: str,
    reason: str | None,
    lowering: str,
) -> None:
    choice = choose(ask(outline(**pattern), lowering=lowering, **settings), DeviceFacts("cuda", 90))
    why = None if reason is None else f"no Hopper kernel: {reason}"
    assert choice == Choice(f"{kernel}-{lowering}", why)
    assert choice.target == ("hopper" if kernel == "hopper" else "portable")
    assert choice.generated == (lowering == "baked")


def test_another_triton_is_a_reason() -> None:
    facts = DeviceFacts("cuda", 90, gluon="triton 9 has no such thing")
    expected = Choice("triton-baked", "no Hopper kernel: triton 9 has no such thing")
    assert choose(ask(outline()), facts) == expected


@pytest.mark.parametrize(
    ("arch", "more", "lowering", "expected"),
    [
        (80, {"weighted": True}, "table", Choice("triton-table")),
        (80, {"weighted": True}, "baked", Choice("triton-table", SPECIAL)),
        (100, {"pooled": 2}, "baked", Choice("triton-table", SPECIAL)),
        (90, {"weighted": True}, "table", Choice("hopper-table")),
        (90, {"weighted": True}, "baked", Choice("hopper-table", SPECIAL)),
        (90, {"pooled": 2}, "baked", Choice("triton-table", SPECIAL)),
        (
            90,
            {"pooled": 2},
            "table",
            Choice("triton-table", "no Hopper kernel: it takes no pooled keys"),
        ),
    ],
)
def test_weights_and_pooled_keys_are_served_by_tables(
    arch: int, more: dict[str, Any], lowering: str, expected: Choice
) -> None:
    request = ask(outline(**more), lowering=lowering)
    assert choose(request, DeviceFacts("cuda", arch)) == expected


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("softmax", ["auto", "exact", "fixed"])
@pytest.mark.parametrize("lowering", ["baked", "table"])
def test_short_sequences_take_the_exact_softmax(arch: int, softmax: Any, lowering: str) -> None:
    facts = DeviceFacts("cuda", arch)
    for tokens, expected in ((FIXED_FROM, softmax), (FIXED_FROM - 1, "exact")):
        request = ask(outline(tokens=tokens), softmax=softmax, lowering=lowering)
        assert choose(request, facts).softmax == expected


@pytest.mark.parametrize(
    ("facts", "settings", "words"),
    [
        (DeviceFacts("meta"), {}, "no block-sparse kernel for this device"),
        (DeviceFacts("cuda", 75), {}, "this GPU or dtype"),
        (DeviceFacts("cuda", 90, hip=True), {}, "this GPU or dtype"),
        (DeviceFacts("cuda", 90), {"dtype": FP64}, "this GPU or dtype"),
        (DeviceFacts("cuda", 80), {"head_dim": 257}, "head dimension"),
        (DeviceFacts("cuda", 80), {"dtype": torch.int32}, "floating-point"),
        (DeviceFacts("cpu"), {"dtype": torch.int32}, "floating-point"),
        (DeviceFacts("cpu"), {"dtype": torch.int32, "lowering": "reference"}, "floating-point"),
    ],
)
def test_what_nothing_serves_is_an_error(
    facts: DeviceFacts, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(KernelError, match=words):
        choose(ask(outline(), **settings), facts)


@pytest.mark.parametrize(
    ("facts", "tokens", "settings", "kernel"),
    [
        (DeviceFacts("cpu"), DENSE_FROM, {}, "sdpa"),
        (DeviceFacts("meta"), DENSE_FROM, {}, "sdpa"),
        (DeviceFacts("cuda", 100), DENSE_FROM, {}, "sdpa"),
        (DeviceFacts("cuda", 90), DENSE_FROM - 1, {}, "sdpa"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {}, "hopper-table"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {"lowering": "table"}, "hopper-table"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {"hopper": False}, "sdpa"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {"head_dim": 96}, "sdpa"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {"lasting": False}, "sdpa"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {"lowering": "reference"}, "reference"),
        (DeviceFacts("cuda", 90), DENSE_FROM, {"dense": False}, "hopper-baked"),
        (DeviceFacts("cpu"), DENSE_FROM, {"dense": False}, "native-cpu"),
    ],
)
def test_dense_attention_is_left_to_the_stock_kernel_unless_another_is_faster(
    facts: DeviceFacts, tokens: int, settings: dict[str, Any], kernel: str
) -> None:
    request = ask(outline(tokens=tokens, full=True), **{"dense": True, **settings})
    assert choose(request, facts).kernel == kernel
    other = ask(outline(tokens=tokens), **{"dense": True, **settings})
    if facts.type != "meta":
        assert choose(other, facts).kernel != "sdpa"


def test_patterns_that_come_and_go_take_no_kernel_of_their_own() -> None:
    for arch, kernel in ((80, "triton-table"), (90, "hopper-table")):
        assert choose(ask(outline(), lasting=False), DeviceFacts("cuda", arch)) == Choice(kernel)


@pytest.mark.parametrize(
    ("facts", "settings", "pattern", "kernel", "reason"),
    [
        (DeviceFacts("cpu"), {}, {}, "native-cpu-zones", None),
        (DeviceFacts("cpu"), {"dtype": FP64, "head_dim": 300}, {}, "native-cpu-zones", None),
        *((DeviceFacts("cuda", arch), {}, {}, "triton-zones", None) for arch in OTHER_GPUS),
        (DeviceFacts("cuda", 90), {}, {}, "hopper-zones", None),
        (DeviceFacts("cuda", 90), {"dtype": FP16, "head_dim": 64}, {}, "hopper-zones", None),
        (DeviceFacts("cuda", 90), {}, {"block": (128, 64)}, "hopper-zones", None),
        (DeviceFacts("cuda", 90), {"dense": True}, {}, "hopper-zones", None),
        (DeviceFacts("cuda", 90), {"hopper": False}, {}, "triton-zones", None),
        (
            DeviceFacts("cuda", 90),
            {"dtype": FP32},
            {},
            "triton-zones",
            "it takes bfloat16 and float16, not torch.float32",
        ),
        (
            DeviceFacts("cuda", 90),
            {},
            {"block": (64, 64)},
            "triton-zones",
            "it takes blocks of 128x128 and 128x64 tokens, not 64x64",
        ),
        (
            DeviceFacts("cuda", 90),
            {},
            {"tokens": 1 << 21},
            "triton-zones",
            "the words of zones name at most 16383 blocks a side",
        ),
        (DeviceFacts("cuda", 90, gluon="no"), {}, {}, "triton-zones", "no"),
    ],
)
def test_zones_take_their_own_kernels_or_say_why_not(
    facts: DeviceFacts,
    settings: dict[str, Any],
    pattern: dict[str, Any],
    kernel: str,
    reason: str | None,
) -> None:
    why = None if reason is None else f"no Hopper kernel: {reason}"
    pattern_of_zones = zones(**pattern)
    choice = choose(ask(pattern_of_zones, lowering="table", **settings), facts)
    assert choice == Choice(kernel, why)
    assert not choice.generated
    baked = ask(pattern_of_zones, lowering="baked", **settings)
    if facts.type == "cuda":
        assert choose(replace(baked, lasting=False), facts) == choice
        assert choose(baked, facts) == Choice(f"{kernel}-baked", why)
        assert choose(baked, facts).generated
        assert choose(baked, facts).target == choice.target
    else:
        assert choose(baked, facts) == choice
    assert choice.target == ("hopper" if kernel == "hopper-zones" else "portable")
    reference = ask(pattern_of_zones, lowering="reference", **settings)
    assert choose(reference, facts) == Choice("reference")


def test_zones_that_nothing_serves_are_an_error() -> None:
    for facts in (DeviceFacts("meta"), DeviceFacts("cuda", 75)):
        with pytest.raises(KernelError):
            choose(ask(zones(), dense=True), facts)


def test_zones_of_short_sequences_take_the_exact_softmax() -> None:
    for tokens, expected in ((FIXED_FROM, "fixed"), (FIXED_FROM - 1, "exact")):
        request = ask(zones(tokens=tokens), softmax="fixed")
        assert choose(request, DeviceFacts("cuda", 90)).softmax == expected


def test_what_is_known_undecoded_is_what_the_pattern_says() -> None:
    some = torch.eye(2, dtype=torch.bool).expand(2, 2, 2)
    every = torch.ones(2, 2, 2, dtype=torch.bool)
    copying = {"repetitive": np.array([True, False]), "copies": AnchorRows((2, 8, 16), 8)}
    patterns = {
        "some": BlockPattern.from_mask(some),
        "every": BlockPattern.from_mask(every),
        "weighted": BlockPattern.from_mask(every, weight=torch.full((2, 2, 2), 2.0)),
        "pooled": BlockPattern.from_mask(some, pooled=2),
        "copying": BlockPattern.from_mask(every, **copying),  # type: ignore[arg-type]
    }
    assert [name for name, pattern in patterns.items() if pattern.full] == ["every"]
    settings = KernelSettings(device=torch.device("cuda"), dtype=BF16, head_dim=128)
    for pattern in patterns.values():
        for site in (s := SitePatterns.share([pattern])), s.packed():
            known = site.outline(0)
            assert (known.full, known.weighted) == (pattern.full, pattern.weighted)
            for facts in (DeviceFacts("cpu"), DeviceFacts("cuda", 80), DeviceFacts("cuda", 90)):
                assert choose(settings.request(known, dense=True), facts) == choose(
                    settings.request(pattern, dense=True), facts
                )


def energy(**given: Any) -> EnergyRequest:
    where = {"device": torch.device("cuda"), "dtype": BF16, "head_dim": 128}
    return EnergyRequest(**{**where, "lengths": (500, 500), "block": (128, 128), **given})


@pytest.mark.parametrize(
    ("facts", "given", "kernel"),
    [
        (DeviceFacts("cpu"), {}, "native-energy"),
        (DeviceFacts("cpu"), {"output": True}, "native-fused"),
        (DeviceFacts("cpu"), {"output": True, "every": 2}, "native-energy"),
        (DeviceFacts("meta"), {}, "plain-energy"),
        (DeviceFacts("cuda", 75), {"output": True}, "plain-energy"),
        (DeviceFacts("cuda", 90, hip=True), {"output": True}, "plain-energy"),
        (DeviceFacts("cuda", 80), {"dtype": FP64, "output": True}, "plain-energy"),
        (DeviceFacts("cuda", 80), {"head_dim": 257, "output": True}, "plain-energy"),
        *((DeviceFacts("cuda", arch), {}, "triton-energy") for arch in (80, 90)),
        *((DeviceFacts("cuda", arch), {"output": True}, "triton-fused") for arch in OTHER_GPUS),
        (DeviceFacts("cuda", 90), {"output": True}, "hopper-fused"),
        (DeviceFacts("cuda", 90), {"output": True, "block": (64, 64)}, "triton-fused"),
        (DeviceFacts("cuda", 90, gluon="no"), {"output": True}, "triton-fused"),
        (DeviceFacts("cuda", 90), {"output": True, "head_dim": 96}, "triton-fused"),
        (DeviceFacts("cuda", 90), {"output": True, "head_dim": 256}, "triton-energy"),
        (DeviceFacts("cuda", 90), {"output": True, "dtype": FP32}, "triton-energy"),
        (DeviceFacts("cuda", 90), {"output": True, "every": 4}, "triton-energy"),
        (DeviceFacts("cuda", 90), {"output": True, "fused": False}, "triton-energy"),
    ],
)
def test_energies(facts: DeviceFacts, given: dict[str, Any], kernel: str) -> None:
    assert choose_energy(energy(**given), facts).kernel == kernel


@pytest.mark.parametrize("given", [{"every": 2}, {"dtype": FP32}, {"head_dim": 256}])
def test_one_kernel_for_both_is_refused_where_there_is_none(given: dict[str, Any]) -> None:
    with pytest.raises(KernelError, match="one kernel"):
        choose_energy(energy(output=True, fused=True, **given), DeviceFacts("cuda", 90))
