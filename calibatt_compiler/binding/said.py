"""Warnings of a compiled model: each is given once, however many graphs and parts it has."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from calibatt_compiler.logs import logger

log = logger("passes")


class Said:
    """What was said of one model under the options of one compile call.

    Attributes:
        met: whether a site of the plan was seen.
        served: whether one was served.
    """

    def __init__(self) -> None:
        self.met = False
        self.served = False
        self._about: set[str] = set()

    def warn(self, about: str, message: str, *args: object) -> None:
        """Log a warning, unless there was one about the same."""
        if about not in self._about:
            self._about.add(about)
            log.warning(message, *args)


class HasSaid(Protocol):
    """Options of a compile call.

    Attributes:
        said: what was said of it, where no model can be seen.
    """

    said: Said


_known: WeakKeyDictionary[torch.nn.Module, list[tuple[HasSaid, Said]]] = WeakKeyDictionary()


def said_of(root: torch.nn.Module | None, options: HasSaid) -> Said:
    """Return what was said of a model under options.

    Args:
        root: the model; None if it can't be seen: what was said of the compile call.
        options: of the compile call.
    """
    if root is None:
        return options.said
    held = _known.setdefault(root, [])
    for known, said in held:
        if known == options:
            return said
    held.append((options, Said()))
    return held[-1][1]
