"""Which kernel serves: chosen here from a request and what is known of a device, nowhere else.

| device | dtype | lowering | kernel |
|---|---|---|---|
| any | any float | reference | `reference` |
| CPU | any float | any other | `native-cpu` (C++) |
| CUDA, sm_80 and newer | float32, bfloat16, float16 | table | `triton-table` |
| CUDA, sm_80 and newer | float32, bfloat16, float16 | baked | `triton-baked` |
| CUDA, sm_90, unless `hopper=False` | bfloat16, float16 | table | `hopper-table` (Gluon) |
| CUDA, sm_90, unless `hopper=False` | bfloat16, float16 | baked | `hopper-baked` (Gluon) |

A pattern that keeps every block is left to `sdpa` where the request allows it. Octave zones have
kernels of their own under the same conditions: `native-cpu-zones`, `triton-zones` and
`hopper-zones`, the latter two with `-baked` where their runs are literals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.hopper.capability import gluon_reason, operand_reason
from calibatt_compiler.kernels.portable.tiles import (
    HOPPER,
    MAX_HEAD_DIM,
    architecture,
    check_head_dim,
)
from calibatt_compiler.kernels.request import AnyPattern, KernelRequest, Softmax, Target
from calibatt_compiler.plan.stored import PatternOutline
from calibatt_compiler.plan.zones import ZonePattern

OLDEST = 80
"""Compute capability from which on the Triton kernels serve: Ampere."""

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FIXED_FROM = 8192
"""Keys from which on a fixed softmax shift is asked for. On short sequences the launch that
recomputes (61 microseconds of the host, measured beside an H100) outweighs what it saves."""

DENSE_FROM = 1 << 14
"""Keys from which on the Hopper kernel serves dense attention too: there a GPU is far from waiting
for its host, and it was 1.27 times as fast as cuDNN's kernel at twice that."""


NOT_GENERATED = "generated source has no masks over keys yet"


@dataclass(frozen=True)
class DeviceFacts:
    """What a choice asks of a device.

    Attributes:
        type: as of `torch.device`.
        arch: compute capability of a GPU as one number, such as 90.
        hip: it is an AMD GPU.
        gluon: why the Hopper kernels can't be compiled here; None if they can.
        name: of a GPU, for messages.
    """

    type: str
    arch: int = 0
    hip: bool = False
    gluon: str | None = None
    name: str = "a GPU"

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        """Look at a device."""
        if device.type != "cuda":
            return cls(device.type)
        arch = architecture(device)
        gluon = gluon_reason() if arch == HOPPER else None
        hip = torch.version.hip is not None
        return cls("cuda", arch, hip, gluon, torch.cuda.get_device_name(device))

    def runs_triton(self, dtype: torch.dtype) -> bool:
        """Whether the Triton kernels serve it, in a dtype."""
        nvidia = self.type == "cuda" and not self.hip
        return nvidia and self.arch >= OLDEST and dtype in CUDA_DTYPES


@dataclass(frozen=True)
class Choice:
    """What serves a request.

    Attributes:
        kernel: its kind, see `AttentionKernel`; or `sdpa`, stock dense attention.
        reason: why it is another one than was asked for; else None.
        softmax: which softmax to ask it for.
    """

    kernel: str
    reason: str | None = None
    softmax: Softmax = "auto"

    @property
    def target(self) -> Target:
        """Whose kernels it is of, on a GPU."""
        return "hopper" if self.kernel.startswith("hopper") else "portable"

    @property
    def generated(self) -> bool:
        """Whether it is a kernel of its own for the pattern."""
        return self.kernel.endswith("-baked")


def choose(request: KernelRequest[AnyPattern], facts: DeviceFacts) -> Choice:
    """Return what serves a request on a device.

    Raises:
        KernelError: nothing does.
    """
    pattern = request.pattern
    if request.lowering == "reference":
        _check_float(request.dtype)
        return Choice("reference")
    hopper = _hopper_reason(request, facts)
    full = request.dense and not isinstance(pattern, ZonePattern) and pattern.full
    if full and (hopper is not None or not request.lasting or pattern.key_length < DENSE_FROM):
        return Choice("sdpa")
    _check_float(request.dtype)
    if facts.type == "cpu":
        return Choice("native-cpu-zones" if isinstance(pattern, ZonePattern) else "native-cpu")
    if facts.type != "cuda":
        raise KernelError(
            "there is no block-sparse kernel for this device",
            expected="cpu or cuda",
            got=facts.type,
            remedy="use the option lowering='reference', which runs everywhere, slowly",
        )
    if not facts.runs_triton(request.dtype):
        raise KernelError(
            "the Triton kernels don't serve this GPU or dtype",
            expected="an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; float32, bfloat16 "
            "or float16",
            got=f"{facts.name}, {request.dtype}",
            remedy="use the option lowering='reference'",
        )
    check_head_dim(request.head_dim)
    reason = None
    if request.hopper and facts.arch == HOPPER and hopper is not None:
        reason = f"no Hopper kernel: {hopper}"
    softmax = "exact" if pattern.key_length < FIXED_FROM else request.softmax
    family = "triton" if hopper is not None else "hopper"
    if isinstance(pattern, ZonePattern):
        generated = request.lowering == "baked" and request.lasting
        if generated and request.padded:
            generated, reason = False, reason or NOT_GENERATED
        return Choice(f"{family}-zones{'-baked' if generated else ''}", reason, softmax)
    # Neither dense attention nor what comes and goes is worth a kernel of its own.
    how = "baked" if request.lowering == "baked" and request.lasting and not full else "table"
    if how == "baked" and (pattern.weighted or pattern.pooled):
        how, reason = "table", "generated source has no weights and no pooled keys yet"
    if how == "baked" and request.padded:
        how, reason = "table", reason or NOT_GENERATED
    return Choice(f"{family}-{how}", reason, softmax)


def _check_float(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise KernelError(
            "attention needs a floating-point dtype",
            expected="float64, float32, bfloat16 or float16",
            got=dtype,
            remedy="cast the model",
        )


def _hopper_reason(request: KernelRequest[AnyPattern], facts: DeviceFacts) -> str | None:
    """Why the Hopper kernel does not serve a request, or None if it does."""
    if not request.hopper or facts.type != "cuda" or facts.hip or facts.arch != HOPPER:
        return "it needs a Hopper GPU, and the option hopper=True"
    pattern = request.pattern
    if request.padded == "any":
        return "of masks over keys it takes those that cut a tail"
    if request.padded and (isinstance(pattern, ZonePattern) or pattern.weighted):
        return "it takes no masks over keys with zones or weights"
    return operand_reason(request.dtype, request.head_dim, request.pattern) or facts.gluon


@dataclass(frozen=True)
class EnergyRequest:
    """Block energies that are asked for.

    Attributes:
        device: of the operands.
        dtype: of the operands.
        head_dim: channels a head.
        lengths: queries and keys.
        block: tokens a query block, tokens a key block.
        every: which queries count: one in so many.
        output: the output of dense attention is asked for, too.
        fused: on a GPU, both by one kernel (True) or not (False); None: where that pays.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    lengths: tuple[int, int]
    block: tuple[int, int]
    every: int = 1
    output: bool = False
    fused: bool | None = None


def choose_energy(request: EnergyRequest, facts: DeviceFacts) -> Choice:
    """Return what gives block energies on a device.

    With the output: `native-fused`, `hopper-fused` and `triton-fused` are one kernel for both; the
    others are a pass for the energies alone, and dense attention comes before it.

    Raises:
        KernelError: one kernel is insisted on where there is none.
    """
    if facts.type == "cpu":
        return Choice("native-fused" if request.output and request.every == 1 else "native-energy")
    if not facts.runs_triton(request.dtype) or request.head_dim > MAX_HEAD_DIM:
        return Choice("plain-energy")
    can = request.every == 1 and fuses(request.dtype, request.head_dim)
    if not request.output or not (can if request.fused is None else request.fused):
        return Choice("triton-energy")
    if not can:
        raise KernelError(
            "one kernel can't give output and these energies",
            expected="bfloat16 or float16, head dim up to 128, queries=1",
            got=f"{request.dtype}, head dim {request.head_dim}, queries=1/{request.every}",
            remedy="leave out fused=True",
        )
    outline = PatternOutline(1, *request.lengths, *request.block, full=True)
    asked = KernelRequest(
        outline, device=request.device, dtype=request.dtype, head_dim=request.head_dim
    )
    reason = _hopper_reason(asked, facts)
    return Choice("hopper-fused" if reason is None else "triton-fused", reason)


def fuses(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one kernel gives output and energies by default on a GPU.

    By work, not by measurement (docs/energies.md): the pass for the energies repeats half of the
    products and all exponentials of dense attention, the fused kernel repeats nothing but is a
    portable one. In float32 and for large heads it would spill.
    """
    return dtype.itemsize == 2 and head_dim <= 128
