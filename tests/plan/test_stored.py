"""Stored patterns: decoded when asked for, checked when decoded, few kept."""

from __future__ import annotations

import mmap
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns, encoding
from calibatt_compiler.plan.stored import CACHED, PatternSize, StoredPatterns

STEPS = 12


def patterns(seed: int = 0, steps: int = STEPS) -> list[BlockPattern]:
    """Patterns of neighbouring steps that differ in few blocks, one of them dense."""
    draw = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(seed))
    masks = [draw < 0.2 + 0.05 * step for step in range(steps)]
    for mask in masks:
        mask[..., 0] = True
    masks[steps // 2] = torch.ones_like(draw, dtype=torch.bool)
    return [BlockPattern.from_mask(mask, block=(16, 16)) for mask in masks]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the arrays that were decoded."""
    calls: list[int] = []
    original = encoding.decode

    def counted(method, code, length, previous):
        calls.append(length)
        return original(method, code, length, previous)

    monkeypatch.setattr(encoding, "decode", counted)
    return calls


def test_a_sequence_of_the_same_patterns():
    plain = patterns()
    stored = StoredPatterns.pack(plain)
    assert len(stored) == STEPS
    assert [p.digest for p in stored] == [p.digest for p in plain] == list(stored.digests)
    assert [p.kept for p in plain] == list(stored.kept)
    assert [p.digest for p in stored[3:9:2]] == [p.digest for p in plain[3:9:2]]
    assert stored[-1].digest == plain[-1].digest
    for order in (reversed(range(STEPS)), np.random.default_rng(0).permutation(STEPS)):
        for index in order:
            assert np.array_equal(stored[int(index)].bits, plain[index].bits)
    for index in (STEPS, -STEPS - 1):
        with pytest.raises(IndexError):
            stored[index]
    with pytest.raises(ValueError, match="read-only"):
        stored[0].bits[...] = 0
    assert StoredPatterns.pack(stored) is stored


def test_weights_and_pooling_come_back():
    """Weights also where they come and go from pattern to pattern."""
    generator = torch.Generator().manual_seed(0)
    plain = []
    for step in range(6):
        mask = torch.rand(3, 20, 30, generator=generator) < 0.4
        mask[..., 0] = True
        weight = 1 + 3 * torch.rand(mask.shape, generator=generator) if step in (1, 2, 4) else None
        plain.append(BlockPattern.from_mask(mask, block=(16, 16), weight=weight, pooled=4))
    stored = StoredPatterns.pack(plain)
    for index in (5, 4, 0, 2, 1, 3):
        assert stored[index].digest == plain[index].digest
        assert stored[index].pooled == 4
        assert (stored[index].weights is None) == (plain[index].weights is None)


def test_steps_in_order_decode_each_pattern_once(decoded: list[int]):
    stored = StoredPatterns.pack(patterns())
    assert not decoded
    for index in range(STEPS):
        first = stored[index]
        assert stored[index] is first
    assert len(decoded) == STEPS
    assert len(stored._cache) == CACHED


def test_nothing_is_decoded_that_is_not_asked_for(tmp_path: Path, decoded: list[int]):
    sites = {f"s{i}": SitePatterns.share(patterns(i)) for i in range(3)}
    sampler = Sampler(timesteps=tuple(range(STEPS)))
    made = Plan.create(sites, grid=(1, 15, 32), sampler=sampler)
    made.save(tmp_path / "p")
    plan = Plan.load(tmp_path / "p")
    assert plan.digest == made.digest
    assert plan.density() == made.density() < 1
    assert plan.density("s1", 3) == made.density("s1", 3)
    assert "density" in repr(plan)
    site = plan.sites["s2"]
    assert (site.heads, site.query_length, site.key_length) == (3, 320, 480)
    assert site.size == PatternSize(3, 320, 480, 16, 16)
    plan.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "p").read_bytes()
    assert not decoded
    plan.block_mask("s0", 0)
    assert len(decoded) == 1


def test_codes_are_a_view_of_the_mapped_file(tmp_path: Path):
    site = SitePatterns.share([BlockPattern.dense(1, 64, 64, (16, 16))])
    from calibatt_compiler.plan import Sampler

    Plan.create({"a": site}, grid=(1, 1, 64), sampler=Sampler(timesteps=(1.0,))).save(
        tmp_path / "p"
    )
    plan = Plan.load(tmp_path / "p")
    code = plan.sites["a"].patterns.code
    address = code.ctypes.data
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    line = next(line for line in maps.read_text().splitlines() if _holds(line, address))
    assert line.endswith(str(tmp_path / "p")), line
    assert (address + len(code)) % mmap.PAGESIZE == (tmp_path / "p").stat().st_size
    with pytest.raises(ValueError, match="read-only"):
        code[0] = 1


def _holds(line: str, address: int) -> bool:
    found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
    return found is not None and int(found[1], 16) <= address < int(found[2], 16)


def test_threads_get_the_same_patterns():
    plain = patterns()
    stored = StoredPatterns.pack(plain)
    order = np.random.default_rng(0).integers(0, STEPS, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda index: stored[index].digest, order))
    assert got == [plain[index].digest for index in order]


@pytest.mark.parametrize("index", [0, 1])
def test_every_flipped_bit_is_noticed_when_decoded(index: int):
    """Also without the checksum of the file: whatever decodes must have the digest on record."""
    stored = StoredPatterns.pack(patterns(steps=4))
    code = stored.code.copy()
    accepted = []
    for bit in range(8 * len(code)):
        flipped = code.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        changed = replace(stored, code=flipped)
        try:
            got = changed[index].digest
        except PlanError:
            continue
        assert got == stored.digests[index]
        accepted.append(bit)
    # Codes of later patterns are not read, and zlib ignores the last bits of the last byte.
    needed = 8 * sum(length for entry in stored.entries[: index + 1] for *_, length in entry)
    assert sum(bit < needed for bit in accepted) <= 7 * (index + 1)


def test_sites_are_made_of_either():
    plain = SitePatterns.share(patterns(), head_dim=8)
    packed = plain.packed()
    assert packed.digests == plain.digests
    assert packed.head_dim == 8
    assert [packed.kept_at(s) for s in range(STEPS)] == [plain.kept_at(s) for s in range(STEPS)]
    assert packed.at(STEPS // 2).density == plain.density_at(STEPS // 2) == 1.0
    with pytest.raises(PlanError, match="or a pattern no step"):
        SitePatterns(packed.patterns, (0,))
