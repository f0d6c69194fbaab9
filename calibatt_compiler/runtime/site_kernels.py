"""How the kernels of one site are made."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import cast

from calibatt_compiler.kernels.attention import make_attention
from calibatt_compiler.kernels.common.zone_step import ZoneKernel
from calibatt_compiler.kernels.dispatch import DeviceFacts, choose
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.kernels.zones import make_zones
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.text import fit_pattern


class SiteKernelFactory:
    """Makes the kernels of one site.

    Apart from the site, which holds the cache that holds this: with a cycle, tables of a model that
    is gone would stay until Python looks for cycles.

    Args:
        plan: the plan.
        name: of the site.
        settings: what its kernels have in common.

    Attributes:
        dense: indices of the patterns that stock dense attention serves at the plan's own lengths.
        held: for each diffusion step what its kernel is held by: the index of its pattern; of
            zones that of its step group, all steps of which one kernel serves.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim.
    """

    def __init__(self, plan: Plan, name: str, settings: KernelSettings) -> None:
        self._plan = plan
        self._site = site = plan.sites[name]
        self._settings = settings
        self.held = site.steps if site.zones is None else site.zones.groups
        self._facts = DeviceFacts.of(settings.device)
        outlines = {index: site.outline(step) for step, index in enumerate(site.steps)}
        self._full = {
            index
            for index, outline in outlines.items()
            if outline.full and settings.lowering != "reference"
        }
        self.dense = frozenset(
            index
            for index, outline in outlines.items()
            if choose(settings.request(outline, dense=True), self._facts).kernel == "sdpa"
        )

    def is_full(self, index: int) -> bool:
        """Whether a pattern is dense attention, for which the order of tokens does not matter."""
        return index in self._full

    def pattern(self, index: int, lengths: Hashable) -> BlockPattern:
        """Return a pattern, completed for `lengths`; see `make`."""
        if lengths is None:
            return self._site.patterns[index]
        to = cast("tuple[int, int]", lengths)
        if self._site.zones is not None:
            return self._site.zones.fitted(index, to)
        pattern, position = self._site.patterns[index], self._plan.text_position
        assert position is not None
        return fit_pattern(pattern, to, video=math.prod(self._plan.grid), position=position)

    def at(self, kernel: AttentionKernel | ZoneKernel, step: int) -> AttentionKernel:
        """Return what serves a step by the kernel that `held` names for it."""
        if self._site.zones is None:
            return cast("AttentionKernel", kernel)
        return cast("ZoneKernel", kernel).at(step)

    def make(self, index: int, lengths: Hashable) -> AttentionKernel | ZoneKernel | None:
        """Return the kernel of a pattern or step group; None: stock dense attention serves it.

        Args:
            index: of the pattern, or of the step group; see `held`.
            lengths: tokens on the query and key side, where the text is of another length than the
                plan's and the pattern is to be completed; else None.

        Raises:
            KernelError: there is no kernel for this device, dtype and head dim.
            PlanFormatError: the plan's record contradicts its zones.
        """
        # Text lengths come and go with prompts.
        lasting = lengths is None
        if (zones := self._site.zones) is not None:
            group = (
                zones.group(index)
                if lengths is None
                else zones.fitted_group(index, cast("tuple[int, int]", lengths))
            )
            return make_zones(self._settings.request(group, lasting=lasting))
        if lengths is None and index in self.dense:
            return None
        request = self._settings.request(self.pattern(index, lengths), dense=True, lasting=lasting)
        choice = choose(request, self._facts)
        return None if choice.kernel == "sdpa" else make_attention(request, choice)
