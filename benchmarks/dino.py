"""How well block-sparse forms keep the attention of a real pretrained model, DINOv2-S/14.

    pip install -e '.[report,benchmarks]'
    python benchmarks/dino.py --work /tmp/dino --minutes 15 --out results

Calibrates on frames of a film, measures on held-out frames of it and on photographs: the relative
error of each layer's attention output (on its dense input) and of the final features (all layers at
once), all methods at equal density. CPU, float32. Everything is cached below --work: run it again
to go on where it stopped. Prints a table, writes the curves as a picture and OUT/dino.json.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from dino_study.check import difference
from dino_study.footage import PHOTOS, film_frame, film_times, photograph, to_tensor
from dino_study.report import draw, rows, table
from dino_study.study import STAGES, Study
from dino_study.vit import Dino
from dino_study.weights import fetch_model, load_weights
from record import write_record


def film_image(folder: Path, seconds: float, pixels: int) -> torch.Tensor:
    """Return one frame as the network's input."""
    return to_tensor(film_frame(folder, seconds), pixels)


def photo_image(folder: Path, name: str, pixels: int) -> torch.Tensor:
    """Return one photograph as the network's input."""
    return to_tensor(photograph(folder, name), pixels)


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of downloads and results")
    parser.add_argument("--pixels", type=int, default=1022, help="side; a multiple of 14")
    parser.add_argument("--inputs", type=int, default=6, help="calibration frames")
    parser.add_argument("--held-out", type=int, default=2, help="test frames of the film")
    parser.add_argument("--photos", type=int, default=2, help=f"of {len(PHOTOS)} to test on")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.33, 0.2])
    orders = ["raster", "4x16", "16x4", "2x32"]
    parser.add_argument("--orders", nargs="*", default=orders, help="to compare with 8x8 tiles")
    parser.add_argument("--without-fits", action="store_true", help="no fitted weights")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--check", action="store_true", help="compare with onnxruntime and stop")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="where the curves go; default: below --work")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net = Dino().eval()
    net.load_state_dict(load_weights(options.work))
    if options.check:
        image = photo_image(options.work, next(iter(PHOTOS)), 224)
        print(f"relative difference {difference(net, fetch_model(options.work), image):.1e}")
        return
    used, held_out = film_times(options.inputs, options.held_out)
    images = {
        f"film {seconds:g} s": partial(film_image, options.work, seconds, options.pixels)
        for seconds in held_out
    }
    for name in list(PHOTOS)[: options.photos]:
        images[f"photo {name}"] = partial(photo_image, options.work, name, options.pixels)
    side = options.pixels // net.config.patch
    folder = options.work / f"study-{options.pixels}-{options.inputs}"
    study = Study(
        net,
        [partial(film_image, options.work, seconds, options.pixels) for seconds in used],
        images,
        (side, side),
        folder,
        densities=options.densities,
        orders=options.orders,
        fits=not options.without_fits,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    finished = study.run(options.stages)
    print(table(study))
    draw(study, options.picture or folder / "curves.png")
    if options.out is not None:
        settings = {"pixels": options.pixels, "inputs": options.inputs, "block": study.block}
        settings |= {"tests": list(images), "complete": finished}
        write_record(options.out / "dino.json", torch.device("cpu"), rows(study), **settings)
    raise SystemExit(0 if finished else 3)


if __name__ == "__main__":
    main()
