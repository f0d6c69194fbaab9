"""The folder of a comparison: JSON, videos, pictures, and an index page that ties them together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.evaluation.comparison import DENSE, Comparison, PlanResult
from calibatt_compiler.evaluation.curve import write_curve
from calibatt_compiler.evaluation.quality import Frames, Quality
from calibatt_compiler.evaluation.video import contact_sheet, side_by_side, write_video
from calibatt_compiler.files import replacing, write_text
from calibatt_compiler.report import page
from calibatt_compiler.report.pictures import rgb_png
from calibatt_compiler.report.summary import Summary


class Results:
    """Writes what a comparison finds, each file whole or not at all.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        fps: frames a second of the videos.
    """

    def __init__(self, folder: str | os.PathLike[str], *, fps: int = 16) -> None:
        self.folder = Path(folder)
        self._fps = fps
        self._videos: list[tuple[Case, Quality, Path, Path]] = []

    def add_video(
        self, index: int, case: Case, dense: Frames, sparse: Frames, quality: Quality
    ) -> None:
        """Write one case: dense and sparse side by side as MP4, and a sheet of frames as PNG."""
        stem = f"video-{index:02d}"
        label = f"sparse, {_decibel(quality.psnr)}"
        video = write_video(
            self.folder / f"{stem}.mp4",
            side_by_side([("dense", dense), (label, sparse)]),
            self._fps,
        )
        sheet = self.folder / f"{stem}.png"
        with replacing(sheet) as temporary:
            temporary.write_bytes(rgb_png(contact_sheet(dense, sparse)))
        self._videos.append((case, quality, video, sheet))

    def write(
        self,
        comparison: Comparison,
        *,
        title: str,
        links: Sequence[tuple[str, str]] = (),
        facts: Sequence[tuple[str, str]] = (),
    ) -> Path:
        """Write compare.json, summary.txt, curve.png (for several plans) and index.html.

        Args:
            comparison: what was measured.
            title: of the page.
            links: further files in the folder: name and what it is.
            facts: further lines on how it was made: what, and its value.

        Returns:
            Path of the index page.
        """
        text = json.dumps(comparison.to_dict(), indent=1, allow_nan=False)
        write_text(self.folder / "compare.json", text + "\n")
        write_text(self.folder / "summary.txt", str(comparison.main.summary))
        curve = None
        if len(comparison.plans) > 1:
            curve = write_curve(comparison, self.folder / "curve.png")
        index = self.folder / "index.html"
        body = [
            *self._body(comparison, title, curve, links),
            "<h2>How it was made</h2>",
            page.facts([*_facts(comparison), *facts]),
        ]
        write_text(index, page.document(title, body, style=_STYLE))
        return index

    def _body(
        self,
        comparison: Comparison,
        title: str,
        curve: Path | None,
        links: Sequence[tuple[str, str]],
    ) -> list[str]:
        main, config = comparison.main, comparison.config
        files = [
            *links,
            ("compare.json", "all figures, every video and round"),
            ("summary.txt", "what the backend did with each attention call"),
        ]
        against = "stock torch.compile" if config.dense == "inductor" else "eager PyTorch"
        body = [
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">Main plan: {escape(main.label)}. '
            f"Device: {escape(comparison.device)}. Dense is {against}, in the same process.</p>",
            page.tiles(
                [
                    (f"{main.sparsity:.1%}", "sparsity: attention blocks left out"),
                    (f"{main.step_ratio:.2f}x", "speed-up of a denoising step"),
                    (_decibel(main.psnr), f"PSNR, mean of {len(main.videos)} held-out videos"),
                    (f"{main.ssim:.4f}", "SSIM, mean"),
                    (f"{main.video_ratio:.2f}x", "speed-up of a whole video"),
                ]
            ),
            "<h2>Videos</h2>",
            '<p class="soft">Same prompt and seed: dense on the left, sparse on the right.</p>',
            '<div class="videos">',
        ]
        for case, quality, video, sheet in self._videos:
            body.append(
                f'<figure class="panel"><video src="{video.name}" controls loop muted autoplay '
                f"playsinline></video><figcaption>{escape(case.prompt)} (seed {case.seed}): "
                f"{_decibel(quality.psnr)}, SSIM {quality.ssim:.4f}. "
                f'<a href="{sheet.name}">frames and difference</a></figcaption></figure>'
            )
        body.append("</div><h2>Quality against sparsity</h2>")
        if curve is not None:
            body.append(
                f'<div class="panel"><img src="{curve.name}" alt="PSNR and speed-up against '
                f'sparsity" style="max-width:760px;background:#fff"></div>'
            )
        body += [
            page.table(HEADER, [_row(comparison, result) for result in comparison.plans]),
            '<p class="soft">In kernels: what they really leave out, a little less where a kernel '
            "covers a mask by a larger one. PSNR and SSIM compare each sparse video with the "
            "dense one of the same prompt and seed, on 8-bit frames. A denoising step is all calls "
            f"of the model at one timestep: {config.rounds} rounds over "
            f"{len(comparison.times.steps)} steps, all variants in turn, median of the "
            "rounds.</p>",
            "<h2>A denoising step</h2>",
            self._steps(comparison),
            "<h2>What the backend did</h2>",
            _served(main.summary),
            "<h2>Files</h2>",
            '<div class="panel">'
            + "<br>".join(
                f'<a href="{escape(name)}">{escape(name)}</a> '
                f'<span class="soft">{escape(what)}</span>'
                for name, what in files
            )
            + "</div>",
        ]
        return body

    def _steps(self, comparison: Comparison) -> str:
        times, main = comparison.times, comparison.main
        rows = []
        dense, sparse = times.by_step(DENSE), times.by_step(main.label)
        for step, slow, quick in zip(times.steps, dense, sparse, strict=True):
            rows.append(
                [
                    str(step),
                    f"{main.plan.density(step=min(step, main.plan.steps - 1)):.3f}",
                    _seconds(slow),
                    _seconds(quick),
                    f"{slow / quick:.2f}x",
                ]
            )
        return page.table(["step", "density", "dense", "sparse", "speed-up"], rows)


_STYLE = """
.videos { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 0 16px; }
"""
HEADER = (
    "plan",
    "sparsity",
    "in kernels",
    "PSNR dB",
    "SSIM",
    "flicker",
    "dense ms",
    "sparse ms",
    "speed-up",
)


def terminal(comparison: Comparison) -> Table:
    """Return the figures of all plans, to be printed with rich."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption="sparsity: attention blocks left out, by the plan and in the kernels; "
        "ms: of one denoising step",
    )
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for result in comparison.plans:
        table.add_row(*_row(comparison, result))
    return table


def _row(comparison: Comparison, result: PlanResult) -> list[str]:
    computed = result.computed_density
    return [
        result.label,
        f"{result.sparsity:.1%}",
        "" if computed is None else f"{1 - computed:.1%}",
        f"{result.psnr:.2f}",
        f"{result.ssim:.4f}",
        f"{result.flicker:.2f}",
        f"{1000 * comparison.times.median(DENSE):.1f}",
        f"{1000 * result.step_seconds:.1f}",
        f"{result.step_ratio:.2f}x",
    ]


def _served(summary: Summary) -> str:
    rows = []
    for row in summary.rows:
        dense = "; ".join(f"{count} {why}" for why, count in row.dense_calls.items())
        rows.append(
            [
                row.name,
                row.status,
                row.kernel,
                dense,
                "" if row.density is None else f"{row.density:.3f}",
                str(row.sparse_calls),
            ]
        )
    header = ["site", "status", "kernel", "calls served dense", "density", "sparse calls"]
    return page.table(header, rows, text_columns=4)


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    written = comparison.to_dict()
    return [
        ("date", written["date"]),
        ("model", comparison.model),
        ("device", comparison.device),
        ("plan", f"{comparison.main.plan.digest}"),
        ("lowering", comparison.config.lowering),
        ("versions", ", ".join(f"{k} {v}" for k, v in written["versions"].items())),
        (
            "arguments",
            ", ".join(f"{k}={v}" for k, v in written["pipeline_arguments"].items()),
        ),
    ]


def _decibel(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "equal"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{1000 * value:.1f} ms"
