"""Block-sparse attention on a CPU through FlexAttention, compiled by Inductor.

Blocks are tensors handed to the compiled function at run time, so one compilation serves every
pattern of a shape, whatever site and step it belongs to.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.operands import check_operands, token_major
from calibatt_compiler.plan.pattern import BlockPattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FlexCpuAttention:
    """Block-sparse attention on a CPU through FlexAttention with a `BlockMask`.

    Attributes:
        kind: "flex-cpu".
        density: the pattern's own density.

    Raises:
        KernelError: FlexAttention has no CPU template on this machine.
    """

    kind = "flex-cpu"

    def __init__(self, pattern: BlockPattern) -> None:
        if not flex_cpu_available():
            raise KernelError(
                "FlexAttention can't be compiled for this CPU",
                expected="an x86 CPU with AVX2, on Linux or Windows",
                got=f"{sys.platform}, {torch.backends.cpu.get_cpu_capability()}",
                remedy="use GemmCpuAttention, or the option lowering='reference'",
            )
        self.pattern = pattern
        self.density = pattern.density
        count, indices = pattern.kv_blocks()
        self._count, self._indices = count[None], indices[None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Return the attention output, (B, H, Sq, D) laid out as contiguous (B, Sq, H, D).

        The first call of each shape, dtype and layout compiles, which takes some seconds.

        Args:
            q: (B, H, Sq, D) on the CPU, float32, bfloat16 or float16, any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).

        Raises:
            KernelError: the operands don't fit the pattern or one another, or are of a dtype that
                FlexAttention does not take on a CPU.
        """
        pattern = self.pattern
        check_operands(pattern, q, k, v)
        if q.dtype not in DTYPES:
            raise KernelError(
                "FlexAttention does not take this dtype on a CPU",
                expected=" or ".join(str(dtype) for dtype in DTYPES),
                got=q.dtype,
                remedy="cast q, k and v, or use the option lowering='reference'",
            )
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        # Autocast, gradients and inference mode are guards of every compiled function: each call
        # is brought to one state of them, so that none of them is a reason to compile again.
        # An inference tensor stays one outside of inference mode: it is part of the signature.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            operands = tuple(_canonical(x) for x in (q, k, v))
            signature = _Signature(
                layouts=tuple(
                    (tuple(x.shape), x.stride(), x.dtype, x.is_inference()) for x in operands
                ),
                block=(pattern.block_m, pattern.block_n),
                scale=factor,
                blocks_are_inference=self._count.is_inference(),
                threads=torch.get_num_threads(),
            )
            out: Tensor = _compiled.call(signature, (*operands, self._count, self._indices))
            return token_major(out)


def flex_cpu_available() -> bool:
    """Whether Inductor has a FlexAttention template for this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return sys.platform != "darwin" and capability in {"AVX2", "AVX512"}


def _canonical(x: Tensor) -> Tensor:
    """Return x detached, dense in its last dimension, and without strides that mean nothing."""
    x = x.detach()
    if x.stride(-1) != 1:
        x = token_major(x)
    batch, heads, length, head_dim = x.shape
    if batch == 1 or heads == 1 or length == 1:
        strides = [length * heads * head_dim, x.stride(1), x.stride(2), 1]
        if heads == 1:
            strides[1] = head_dim
        if length == 1:
            strides[2] = heads * head_dim
        if batch > 1:
            strides[0] = x.stride(0)
        x = x.as_strided(x.shape, strides)
    return x


class _Signature(NamedTuple):
    """All that the code generated for a call depends on."""

    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool], ...]
    block: tuple[int, int]
    scale: float
    blocks_are_inference: bool
    threads: int


def _flex(  # type: ignore[no-untyped-def] # traced: its code object is copied for each signature
    q, k, v, count, indices, block, lengths, scale
):
    blocks = BlockMask.from_kv_blocks(
        count, indices, BLOCK_SIZE=block, seq_lengths=lengths, compute_q_blocks=False
    )
    # The blocks are kept whole, so nothing is to be evaluated inside of them. A ragged last block
    # is cut to the sequence by the template.
    return flex_attention(  # type: ignore[call-overload] # a template's option, not a typed key
        q, k, v, block_mask=blocks, scale=scale, kernel_options={"SKIP_MASK_SCORE": True}
    )


class _CompiledFunctions:
    """One compiled function for each signature.

    Dynamo counts recompilations by code object and, at its limit, silently runs the function
    eagerly, which for FlexAttention is dense and slow. So each signature has a code object of its
    own, which is compiled exactly once.
    """

    def __init__(self) -> None:
        self._functions: dict[_Signature, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def call(self, signature: _Signature, tensors: tuple[Tensor, ...]) -> Any:
        q, k = (layout[0] for layout in signature.layouts[:2])
        arguments = (*tensors, signature.block, (q[2], k[2]), signature.scale)
        function = self._functions.get(signature)
        if function is not None:
            return function(*arguments)
        with self._lock:
            function = self._functions.get(signature) or self._new(signature)
            # The caller may run under a stance that forbids to compile; it means its own graphs.
            with torch.compiler.set_stance("default"):
                out = function(*arguments)
            self._functions[signature] = function
            return out

    def _new(self, signature: _Signature) -> Callable[..., Any]:
        name = f"calibatt_flex_cpu_{len(self._functions)}"
        code = _flex.__code__.replace(co_name=name)
        function = FunctionType(code, _flex.__globals__, name)
        # Inductor bakes the number of threads into the template's buffers: say which.
        compiled: Callable[..., Any] = torch.compile(
            function, dynamic=False, fullgraph=True, options={"cpp.threads": signature.threads}
        )
        return compiled


_compiled = _CompiledFunctions()
