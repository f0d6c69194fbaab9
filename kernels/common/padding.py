"""Keys that a mask cuts or weighs the same for all queries of a sample: the padding of text.

All of it lies on the operands' device and the host never reads it. A kernel leaves out the keys of
a hole, those between `begin` and `end` if all of them are cut, and adds the bias to the scores of
whatever else it attends there. So a padded tail costs nothing, and padding in the midst neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError

BEGIN, END, HOLE, TAIL = range(4)
"""Columns of `KeyPadding.bounds`."""


@dataclass(frozen=True)
class KeyPadding:
    """What a mask says of the keys of each sample.

    Attributes:
        bias: float32 (B or 1, Sk), contiguous: added to the scaled scores of a key. -inf: it takes
            no part.
        bounds: int32 (B or 1, 4), contiguous: the first key with another bias than 0; one past the
            last of them (both 0 if there is none); 1 if all between are cut; how many keys count if
            those that are cut are the last ones, else -1.
        rows: queries stand where keys do, and one that stands at a key that is cut has the output
            zero.
    """

    bias: Tensor
    bounds: Tensor
    rows: bool = False

    @classmethod
    def of(cls, mask: Tensor, *, rows: bool = False) -> KeyPadding:
        """Read a mask.

        Args:
            mask: (B or 1, Sk), on any device: bool, True takes part, or float, added to the scaled
                scores.
            rows: see `KeyPadding`.
        """
        flat = mask.detach()
        if flat.dtype == torch.bool:
            bias = torch.zeros(flat.shape, device=flat.device).masked_fill_(~flat, -torch.inf)
        else:
            bias = flat.to(torch.float32, copy=True)
        return cls(bias, bounds_of(bias), rows)

    @property
    def valid(self) -> Tensor:
        """Which keys take part, bool (B or 1, Sk)."""
        return self.bias != -torch.inf

    def sample(self, index: int) -> KeyPadding:
        """Return that of one sample of the batch."""
        index = index if len(self.bias) > 1 else 0
        part = slice(index, index + 1)
        return KeyPadding(self.bias[part], self.bounds[part], self.rows)

    def part(self, samples: slice) -> KeyPadding:
        """Return that of some samples of the batch."""
        if len(self.bias) == 1:
            return self
        return KeyPadding(self.bias[samples], self.bounds[samples], self.rows)

    def ordered(self, tokens: Tensor | None) -> KeyPadding:
        """Return that of the keys laid out in another order.

        Args:
            tokens: integers (Sk), the key at each position; None: in their own order.
        """
        if tokens is None:
            return self
        bias = self.bias.index_select(1, tokens)
        return KeyPadding(bias, bounds_of(bias), self.rows)

    def dense_mask(self) -> Tensor:
        """Return it as SDPA takes it, float32 (B or 1, 1, 1, Sk)."""
        return self.bias[:, None, None]

    def clear_rows(self, out: Tensor) -> Tensor:
        """Return an output (B, H, Sq, D) of which the rows that are cut are set to zero, in place.

        Other rows are left as they are, and none if `rows` is not set.
        """
        return out.masked_fill_(~self.valid[:, None, :, None], 0) if self.rows else out

    def check(self, batch: int, keys: int) -> None:
        """Raise `KernelError` unless it is of such operands."""
        if self.bias.shape[1] != keys or len(self.bias) not in (1, batch):
            raise KernelError(
                "a key padding doesn't fit the keys",
                expected=f"(1 or {batch}, {keys})",
                got=tuple(self.bias.shape),
                remedy="pass the mask of this attention call",
            )


def refuse_padding(padding: KeyPadding | None) -> None:
    """Raise `KernelError` if there is a mask over keys, in a kernel that takes none."""
    if padding is not None:
        raise KernelError(
            "this kernel takes no mask over keys",
            expected="calls without a mask",
            got=f"a mask over {padding.bias.shape[1]} keys",
            remedy="make the kernel for requests with padded=True",
        )


def bounds_of(bias: Tensor) -> Tensor:
    """Return `KeyPadding.bounds` of a bias."""
    length = bias.shape[1]
    place = torch.arange(length, dtype=torch.int32, device=bias.device)
    touched = bias != 0
    end = (place + 1).where(touched, 0).amax(1)
    begin = torch.minimum(place.where(touched, length).amin(1), end)
    hole = (bias == -torch.inf).sum(1) == end - begin
    counting = begin.where(end != 0, length).where(hole & ((end == length) | (end == 0)), -1)
    return torch.stack([begin, end, hole.int(), counting.int()], 1).int()
