"""How near sparse videos come to dense ones: our plans, an oracle and the peers' patterns.

    pip install -e '.[report,pipelines,benchmarks]'
    python benchmarks/fidelity.py compare --out results --densities 0.3,0.5 --prompts 2

All methods at equal density on held-out prompts and seeds, against the dense video of the same
prompt and seed: PSNR, SSIM, a distance by features of a DINOv2, flicker. Everything is kept below
--out: run it again to go on where it stopped. Writes OUT/fidelity.json, a table and a picture of
the curves. `--quick` runs all of it at a tiny size and measures nothing.

Equal density means: key work / that of dense attention is the wanted number, over all attention
calls of a video. Our plan's thresholds decide how that is shared out over steps, layers, heads and
rows. The oracle and the peers may keep as many blocks as our plan at each step of each layer, so
they profit from that part of calibration too; the oracle shares them out over heads and rows by
one threshold, the others evenly over all rows. All use the same blocks and the same kernel; no
step is dense for one and sparse for another. With `--even` the peers keep the same number of blocks
at each step of each layer, as many in all. Our plan with pooled keys has thresholds of its own by
which its work, pooled keys counted, comes out the same.

A larger model than the demo's is trained on a GPU, in runs of ten minutes that go on where the last
one stopped:

    python benchmarks/fidelity.py train --run-seconds 540      again and again until it says so
    python benchmarks/fidelity.py compare --model examples/tiny_wan/work/mid/model \\
        --settings examples/tiny_wan/mid.json --inputs 16 --block 64 --out results-mid
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fidelity_study.methods import TITLES
from fidelity_study.perceptual import pretrained
from fidelity_study.report import table, write
from fidelity_study.setting import Setting
from fidelity_study.study import Study

from calibatt_compiler.cli import pipelines
from calibatt_compiler.cli.demo import find, read_settings

QUICK = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3}
QUICK_DENSITY, QUICK_BLOCK, QUICK_C = 0.6, 16, 0.85


def numbers(text: str) -> list[float]:
    """Read numbers with commas between them."""
    return [float(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Read names of methods with commas between them."""
    found = text.split(",")
    if unknown := set(found) - set(TITLES):
        raise argparse.ArgumentTypeError(f"no such methods: {', '.join(sorted(unknown))}")
    return found


def compare(options: argparse.Namespace) -> int:
    """Compare, report; 3 if the time was up before the end."""
    device = pipelines.device_of(options.device)
    dtype = pipelines.dtype_of(options.dtype, device)
    pipe = pipelines.load_pipeline(str(options.model or find("model")), device, dtype)
    chosen = read_settings(options.settings or find("demo.json"))
    arguments = {**chosen.arguments, **(QUICK if options.quick else {})}
    arguments = pipelines.pipeline_arguments(pipe, arguments, options.set)
    prompts, inputs = (1, 2) if options.quick else (options.prompts, options.inputs)
    setting = Setting(
        arguments=arguments,
        calibration=chosen.calibration[:inputs],
        held_out=chosen.held_out[:prompts],
        densities=[QUICK_DENSITY] if options.quick else options.densities,
        block=QUICK_BLOCK if options.quick else options.block,
        C=QUICK_C if options.quick else options.C,
        k=options.k,
        token_order=options.token_order,
        even=options.even,
        only=options.methods,
        inductor=not options.quick if options.inductor is None else options.inductor,
    )
    perceptual = None
    if not (options.quick or options.without_features):
        perceptual = pretrained(options.features or options.out / "features", device)
    deadline = time.monotonic() + 60 * options.minutes
    study = Study(pipe, setting, options.out, perceptual, deadline)
    finished = study.run()
    write(study, check=options.quick)
    print(table(study))
    return 0 if finished else 3


def train(options: argparse.Namespace) -> int:
    """Train for a while; 3 if there is more to do."""
    from fidelity_study.train import Training

    extra = () if options.log_every is None else ("--log-every", str(options.log_every))
    training = Training(
        options.size,
        options.run_seconds,
        vae_seconds=options.vae_seconds,
        seconds=options.seconds,
        extra=extra,
    )
    return 0 if training.run() else 3


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("compare", help="compare methods on a trained pipeline")
    add.add_argument("--out", type=Path, default=Path("fidelity-results"), help="folder of results")
    add.add_argument("--model", type=Path, help="a pipeline's folder; default: the demo's model")
    add.add_argument("--settings", type=Path, help="prompts and sizes; default: the demo's")
    add.add_argument("--set", action="append", metavar="NAME=VALUE", help="pipeline argument")
    add.add_argument("--densities", type=numbers, default=[0.2, 0.3, 0.5], metavar="D,D")
    add.add_argument("--prompts", type=int, default=4, help="held-out prompts")
    add.add_argument("--inputs", type=int, default=8, help="calibration prompts")
    add.add_argument("--block", type=int, default=32, help="tokens a query block and a key block")
    add.add_argument(
        "--C",
        type=float,
        default=0.999,
        help="our threshold at the first step; a small one: no other than at later ones",
    )
    add.add_argument("--k", type=float, default=8.0, help="how fast it falls")
    add.add_argument("--token-order", help="also our plan in this order, such as 2x4x4")
    add.add_argument("--methods", type=names, metavar="M,M", help=f"of {', '.join(TITLES)}")
    add.add_argument("--even", action="store_true", help="peers keep the same at each step")
    add.add_argument("--features", type=Path, help="folder of DINOv2's weights, as dino.py --work")
    add.add_argument("--without-features", action="store_true", help="no perceptual distance")
    add.add_argument("--device", default="auto")
    add.add_argument("--dtype", default="auto")
    add.add_argument("--inductor", action=argparse.BooleanOptionalAction, help="default: yes")
    add.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    add.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works")
    add.set_defaults(run=compare)
    add = commands.add_parser("train", help="train a larger model of examples/tiny_wan")
    add.add_argument("--size", default="mid", help="of examples/tiny_wan/settings.py")
    add.add_argument("--run-seconds", type=float, default=540.0, help="limit of this run")
    add.add_argument("--vae-seconds", type=float, help="training time of the autoencoder")
    add.add_argument("--seconds", type=float, help="training time of the transformer")
    add.add_argument("--log-every", type=int, help="steps; time is looked at as often")
    add.set_defaults(run=train)
    options = parser.parse_args()
    raise SystemExit(options.run(options))


if __name__ == "__main__":
    main()
