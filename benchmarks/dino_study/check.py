"""Compare our network with the ONNX file that its weights came from."""

from __future__ import annotations

from pathlib import Path

import torch
from dino_study.vit import MEAN, STD, Dino
from torch import Tensor

FEATURES = "/backbone/layernorm/Add_1_output_0"
"""The backbone's output in the ONNX graph, before the decoder."""


def difference(net: Dino, model: Path, image: Tensor) -> float:
    """Return the relative difference of the features from those of onnxruntime.

    Args:
        net: with the weights of `model`.
        model: the ONNX file.
        image: float (1, 3, 224, 224) in [0, 1], the size that the file is made for.
    """
    import onnx
    import onnxruntime

    loaded = onnx.load(model)
    loaded.graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    session = onnxruntime.InferenceSession(
        loaded.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    (found,) = session.run([FEATURES], {"input_image": ((image - mean) / std).numpy()})
    with torch.inference_mode():
        ours = net(image)
    return float((ours - torch.from_numpy(found)).norm() / ours.norm())
