"""Codes of arrays: whatever is written comes back, and damaged codes never do harm."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.plan import encoding


def noise(length: int, share: float, seed: int = 0) -> np.ndarray:
    """Random bytes with a share of set bits, the same whichever tests ran before."""
    return np.packbits(np.random.default_rng(seed).random(8 * length) < share)


ARRAYS = {
    "empty": np.zeros(0, np.uint8),
    "zeros": np.zeros(5000, np.uint8),
    "ones": np.full(5000, 255, np.uint8),
    "one bit, the last": np.packbits(np.arange(8 * 999) == 8 * 999 - 8),
    "gap of 255": np.packbits(
        np.isin(np.arange(4096), [0, 256, 511, 766, 1022]), bitorder="little"
    ),
    "sparse": noise(4000, 0.003),
    "half": noise(4000, 0.5),
    "dense": noise(4000, 0.997),
    "large and sparse": noise(1 << 19, 0.001),
    "large and even": noise(1 << 19, 0.3),
    "numbers": np.random.default_rng(0).normal(size=(40, 59)).astype(np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("change", [None, 0.0, 0.01, 0.5])
def test_what_is_written_comes_back(name: str, change: float | None):
    array = ARRAYS[name]
    plain = encoding.as_bytes(array)
    previous = None if change is None else plain ^ noise(len(plain), change, 1)
    method, code = encoding.encode(array, previous)
    got = encoding.decode(method, np.frombuffer(code, np.uint8), len(plain), previous)
    assert np.array_equal(got, plain)
    assert len(code) <= len(plain)
    assert method.endswith("/previous") or change != 0.0 or name in ("empty", "zeros", "ones")


@given(st.binary(max_size=300), st.binary(min_size=300, max_size=300))
@settings(deadline=None, max_examples=200)
def test_any_bytes_come_back(data: bytes, before: bytes):
    array = np.frombuffer(data, np.uint8)
    for previous in (None, np.frombuffer(before[: len(data)], np.uint8)):
        method, code = encoding.encode(array, previous)
        got = encoding.decode(method, np.frombuffer(code, np.uint8), len(data), previous)
        assert got.tobytes() == data


def test_the_code_that_fits_is_chosen():
    sparse, mixed = noise(1 << 16, 0.01), noise(1 << 16, 0.5, 1)
    regular = np.tile(noise(64, 0.5), 512)
    assert encoding.encode(sparse, None)[0] == "gaps"
    assert encoding.encode(regular, None)[0] == "deflate"
    assert encoding.encode(mixed, None)[0] == "raw"
    assert encoding.encode(mixed, mixed ^ sparse)[0] == "gaps/previous"
    assert encoding.encode(sparse, mixed)[0] == "gaps"


@pytest.mark.parametrize("share", [0.002, 0.01, 0.05])
def test_noise_takes_little_more_than_its_entropy(share: float):
    before, change = noise(1 << 17, 0.4), noise(1 << 17, share, 1)
    _, code = encoding.encode(before ^ change, before)
    share = np.unpackbits(change).mean()
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * (1 << 17)
    assert 0.97 * entropy < len(code) < 1.05 * entropy


def deflated(data: bytes) -> np.ndarray:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return np.frombuffer(packer.compress(data) + packer.flush(), np.uint8)


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("raw", np.zeros(9, np.uint8)),
        ("raw", np.zeros(11, np.uint8)),
        ("deflate", deflated(bytes(9))),
        ("deflate", deflated(bytes(11))),
        ("deflate", deflated(bytes(1 << 26))),
        ("deflate", deflated(bytes(10))[:-1]),
        ("deflate", np.append(deflated(bytes(10)), np.uint8(0))),
        ("deflate", np.zeros(0, np.uint8)),
        ("deflate", np.full(10, 255, np.uint8)),
        ("gaps", deflated(bytes([80]))),
        ("gaps", deflated(bytes(81))),
        ("gaps", deflated(bytes([3, 255]))),
        ("gaps", deflated(bytes(1 << 26))),
        ("raw/previous", np.zeros(10, np.uint8)),
    ],
)
def test_codes_of_something_else_are_refused(method: encoding.Method, code: np.ndarray):
    with pytest.raises(ValueError, match=r"."):
        encoding.decode(method, code, 10, None)


@pytest.mark.parametrize("name", ["sparse", "half", "numbers"])
def test_damaged_codes_raise_or_give_bytes_of_the_right_length(name: str):
    """Checksums notice the damage; decoding must only not crash."""
    plain = encoding.as_bytes(ARRAYS[name])[:800]
    method, code = encoding.encode(plain, None)
    wrong = 0
    for bit in range(8 * len(code)):
        flipped = np.frombuffer(code, np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            got = encoding.decode(method, flipped, len(plain), None)
        except ValueError:
            wrong += 1
            continue
        assert len(got) == len(plain)
    assert method == "raw" or wrong
