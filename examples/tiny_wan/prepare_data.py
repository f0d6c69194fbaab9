"""Fetch the footage by pinned version and cut the chosen shots into one small file.

The film is Big Buck Bunny, (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, CC BY
3.0. The source distribution of moviepy 2.2.1 carries it at 1280x720. The frames of all shots are
kept as WebP images in one safetensors file, which training reads without a video decoder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from settings import SIZES, SMOKE, WORK, Shot, VideoSize, add_size

if TYPE_CHECKING:
    import av

PACKAGE = "moviepy==2.2.1"
SDIST = "moviepy-2.2.1.tar.gz"
SDIST_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
ARCHIVE = (
    "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
)
FILM = "moviepy_10_minutes/resources/bbb.mp4"
FILM_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"


def check(path: Path, expected: str) -> None:
    """Stop unless the file has the expected SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path}: expected sha256 {expected}, found {found}; delete it, try again")


def fetch_film(folder: Path) -> Path:
    """Return the path of the film, downloading the pinned source distribution if need be."""
    film = folder / "bbb.mp4"
    if not film.exists():
        sdist = folder / "sdist" / SDIST
        if not sdist.exists():
            command = [
                sys.executable,
                "-P",
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                ":all:",
            ]
            subprocess.run([*command, PACKAGE, "-d", str(sdist.parent)], check=True)
        check(sdist, SDIST_SHA256)
        with tarfile.open(sdist) as tar:
            member = tar.extractfile(ARCHIVE)
            if member is None:
                raise SystemExit(f"{SDIST} holds no {ARCHIVE}")
            archive = zipfile.ZipFile(io.BytesIO(member.read()))
        temporary = film.with_suffix(".tmp")
        temporary.write_bytes(archive.read(FILM))
        temporary.rename(film)
    check(film, FILM_SHA256)
    return film


def chosen_frames(film: Path, wanted: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode the film up to its last wanted frame and yield the wanted ones."""
    import av

    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                yield index, frame
            if index >= max(wanted):
                return


def shrink(image: Image.Image, size: VideoSize, quality: int) -> bytes:
    """Cut the image's middle to the aspect of ``size``, resize it and return it as WebP."""
    scale = min(image.width / size.width, image.height / size.height)
    width, height = size.width * scale, size.height * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    small = image.resize((size.width, size.height), Image.Resampling.LANCZOS, box=box)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def write_clips(path: Path, shots: list[Shot], images: list[bytes]) -> None:
    """Write the clip file: the encoded frames of all shots, one shot after another."""
    lengths = np.array([len(image) for image in images], dtype=np.int64)
    tensors = {
        "images": np.frombuffer(b"".join(images), dtype=np.uint8),
        "ends": np.cumsum(lengths),
    }
    counts = [{"name": shot.name, "frames": shot.frames} for shot in shots]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"shots": json.dumps(counts)})
    temporary.rename(path)
    size = lengths.sum() / 1e6
    print(f"{path}: {len(images)} frames of {len(shots)} shots, {size:.1f} MB")


def main() -> None:
    """Write the clip file."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_size(parser)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the downloads")
    parser.add_argument("--out", type=Path, help="clip file; default: that of the size")
    parser.add_argument("--smoke", action="store_true", help="two shots, small frames")
    args = parser.parse_args()
    size = SIZES[args.size]
    video = SMOKE if args.smoke else size.video
    shots = size.shots()[: 2 if args.smoke else None]
    order = [shot.start + offset for shot in shots for offset in range(shot.frames)]
    args.work.mkdir(parents=True, exist_ok=True)
    film = fetch_film(args.work)
    images = {
        index: shrink(frame.to_image(), video, size.quality)
        for index, frame in chosen_frames(film, set(order))
    }
    write_clips(args.out or size.clips, shots, [images[index] for index in order])


if __name__ == "__main__":
    main()
