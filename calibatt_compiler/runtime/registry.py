"""Sites by key: how an operator in a compiled graph finds what serves it.

An operator's arguments are tensors, numbers and strings, so it carries a key. Keys are derived
from the plan's digest and the options, not from a counter, so that Inductor's cached code of
another process finds the same site, and a changed plan never meets old code. The compiled graph
owns its sites; they leave the registry with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from calibatt_compiler.errors import KernelError


class Site(Protocol):
    """What serves one attention call of a compiled graph."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float) -> Tensor:
        """Attention over (batch, heads, length, head_dim) operands at a timestep."""


_sites: WeakValueDictionary[str, Site] = WeakValueDictionary()


def register(prefix: str, sites: Mapping[str, Site]) -> dict[str, str]:
    """Make sites known and return their keys by site name.

    The first graph of a prefix has number 0, so that a single model gets the same keys in every
    process; graphs alive at the same time get different ones.
    """
    for number in itertools.count():
        keys = {name: f"{prefix}/{number}/{name}" for name in sites}
        if not any(key in _sites for key in keys.values()):
            _sites.update({keys[name]: site for name, site in sites.items()})
            return keys
    raise AssertionError("unreachable")


def lookup(key: str) -> Site:
    """Return the site of a key.

    Raises:
        KernelError: the graph that owned it is gone, or it was compiled in another process and
            loaded without its plan.
    """
    site = _sites.get(key)
    if site is None:
        raise KernelError(
            "a compiled graph refers to an attention site that is not loaded",
            expected="the plan that the graph was compiled with",
            got=key,
            remedy="compile the model again with torch.compile(..., backend='calibatt')",
        )
    return site
