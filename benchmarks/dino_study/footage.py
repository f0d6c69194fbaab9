"""Images of the study: frames of one film, and photographs that have nothing to do with it.

Film: Big Buck Bunny, (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, CC BY 3.0, from
the source distribution of moviepy 2.2.1. Photographs: astronaut (NASA, public domain), coffee
(R. Michetti, CC0), chelsea (S. van der Walt, CC0) and rocket (SpaceX, public domain) from
scikit-image 0.26.0.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from dino_study.weights import check_sha256, pip_download
from PIL import Image
from torch import Tensor

from calibatt_compiler.files import replacing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"
PHOTO_PACKAGE = "scikit-image==0.26.0"
PHOTOS = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
"""SHA-256 by name below skimage/data."""

FIRST_SECOND, LAST_SECOND = 30.0, 480.0
"""Between the opening titles and the credits."""


def film_times(count: int, held_out: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the calibration frames and of the held-out ones.

    The former stand in the middle of `count` equal spans; the latter at ends of spans, as far from
    them as can be.
    """
    span = (LAST_SECOND - FIRST_SECOND) / count
    used = [FIRST_SECOND + span * (i + 0.5) for i in range(count)]
    ends = [round((i + 1) * count / (held_out + 1)) for i in range(held_out)]
    return used, [FIRST_SECOND + span * end for end in ends]


def film_frame(folder: Path, seconds: float) -> Image.Image:
    """Return the frame at that time; decoded once, then kept as PNG."""
    path = folder / "frames" / f"film-{seconds:07.2f}.png"
    if not path.exists():
        import av

        sys.path.insert(0, str(EXAMPLE))  # its modules import one another by plain names
        try:
            from prepare_data import fetch_film
        finally:
            sys.path.remove(str(EXAMPLE))
        with av.open(str(fetch_film(folder))) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(int(seconds / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= seconds - 1e-3:
                    with replacing(path) as temporary:
                        frame.to_image().save(temporary)
                    break
    return Image.open(path).convert("RGB")


def photograph(folder: Path, name: str) -> Image.Image:
    """Return one of `PHOTOS`, from the pinned wheel."""
    path = folder / "frames" / name
    if not path.exists():
        wheels = folder / "wheels"
        if not list(wheels.glob("scikit_image-*.whl")):
            pip_download(PHOTO_PACKAGE, wheels, "--only-binary", ":all:")
        (wheel,) = wheels.glob("scikit_image-*.whl")
        data = zipfile.ZipFile(wheel).read(f"skimage/data/{name}")
        check_sha256(data, PHOTOS[name], name)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def to_tensor(image: Image.Image, pixels: int) -> Tensor:
    """Cut the middle square, resize it (bicubic) and return float (1, 3, pixels, pixels)."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    resized = image.resize((pixels, pixels), Image.Resampling.BICUBIC, box=box)
    array = np.asarray(resized, dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()
