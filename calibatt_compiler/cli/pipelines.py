"""From what a person typed to a pipeline, prompts and arguments."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibatt_compiler.errors import OptionError, PipelineError
from calibatt_compiler.evaluation.cases import Case

if TYPE_CHECKING:
    import torch

    from calibatt_compiler.plan import Plan

DTYPES = ("float32", "bfloat16", "float16")
# Decoders that diffusers' own pipelines are documented to run in float32.
FLOAT32_DECODERS = ("AutoencoderKLWan",)


def device_of(name: str) -> torch.device:
    """Return the device of `--device`.

    Raises:
        OptionError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name) from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise _no_device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise _no_device(name)
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of `--dtype`; `auto` goes by the device.

    Raises:
        OptionError: another name.
    """
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise OptionError(
            "--dtype has an unknown value",
            expected=f"auto or one of {', '.join(DTYPES)}",
            got=repr(name),
            remedy="leave it out for the default",
        )
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a diffusers pipeline.

    Raises:
        PipelineError: not found, not a pipeline, or without a transformer.
    """
    import torch
    from diffusers import DiffusionPipeline

    remedy = "give a folder that save_pretrained wrote, or the name of a diffusers model on the Hub"
    try:
        config = DiffusionPipeline.load_config(model)
        decoder = (config.get("vae") or (None, None))[1]
        dtypes: dict[str, torch.dtype] = {"default": dtype}
        if decoder in FLOAT32_DECODERS:
            dtypes["vae"] = torch.float32
        with _no_bars(), warnings.catch_warnings():
            # diffusers 0.42 renames the argument and warns; older ones don't know the new name.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtypes)
    except (OSError, ValueError, ImportError) as error:
        raise PipelineError(
            "the model can't be loaded",
            expected="a diffusers pipeline",
            got=f"{model}: {str(error).splitlines()[0]}",
            remedy=remedy,
        ) from error
    if not isinstance(getattr(pipe, "transformer", None), torch.nn.Module):
        raise PipelineError(
            "the model has no transformer to make sparse",
            expected="a pipeline of a diffusion transformer, such as WanPipeline",
            got=type(pipe).__name__,
            remedy=remedy,
        )
    return pipe.to(device)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Leave out the bars of loading, which are over in a moment; those of downloads stay."""
    import diffusers.utils.logging
    import transformers.utils.logging

    modules = (diffusers.utils.logging, transformers.utils.logging)
    shown = [module.is_progress_bar_enabled() for module in modules]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, on in zip(modules, shown, strict=True):
            if on:
                module.enable_progress_bar()


def read_cases(prompts: Path | None, texts: Sequence[str] | None, seed: int) -> list[Case]:
    """Return prompts and seeds from a file and from the command line.

    Raises:
        PipelineError: no prompt, or a file that can't be read.
    """

    entries: list[object] = [] if prompts is None else _entries(prompts)
    entries += texts or []
    cases = []
    for index, entry in enumerate(entries):
        if isinstance(entry, str):
            cases.append(Case(entry, seed + index))
        elif (
            isinstance(entry, Mapping)
            and isinstance(entry.get("prompt"), str)
            and _is_seed(entry.get("seed", 0))
            and set(entry) <= {"prompt", "seed"}
        ):
            cases.append(Case(entry["prompt"], entry.get("seed", seed + index)))
        else:
            raise PipelineError(
                f"entry {index} of {prompts} is no prompt",
                expected='a text, or {"prompt": text, "seed": integer of 64 bits}',
                got=repr(entry)[:80],
                remedy="correct the file",
            )
    if not cases:
        raise PipelineError(
            "there are no prompts",
            expected="at least one",
            got="none",
            remedy='give --prompts FILE, or --prompt "a fox in the snow"',
        )
    return cases


def _is_seed(value: object) -> bool:
    """Whether a generator of torch takes it; JSON knows 1.0 and true, too."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _entries(path: Path) -> list[object]:
    """Return what a file of prompts holds: JSON, JSON lines, or a prompt a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            "the file of prompts can't be read",
            expected="a text file in UTF-8",
            got=f"{path}: {error}",
            remedy="check the path",
        ) from error
    # Lines end where editors end them: str.splitlines would cut a prompt at U+2028 and others.
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line]
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl", ".ndjson"):
        return list(lines)
    try:
        entries = json.loads(text) if suffix == ".json" else [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise PipelineError(
            f"{path} is no JSON",
            expected="a list of prompts" if suffix == ".json" else "a prompt in JSON on each line",
            got=error,
            remedy="correct the file",
        ) from error
    if not isinstance(entries, list):
        raise PipelineError(
            f"{path} holds no list of prompts",
            expected='["...", ...] or [{"prompt": "...", "seed": 0}, ...]',
            got=type(entries).__name__,
            remedy="correct the file",
        )
    return entries


def pipeline_arguments(
    pipe: Any, named: Mapping[str, Any], settings: Sequence[str] | None
) -> dict[str, Any]:
    """Join the options of a video with those of `--set`; what was not given is left out.

    Args:
        pipe: the pipeline, whose call must know each argument.
        named: arguments by the pipeline's own name; None where not given.
        settings: texts `name=value`; a value that is JSON is read as such, else it is a text.

    Raises:
        OptionError: a setting without `=`, or an argument that the pipeline does not take.
    """
    arguments = {name: value for name, value in named.items() if value is not None}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(
                "--set takes a name and a value",
                expected="NAME=VALUE, such as max_sequence_length=256",
                got=setting,
                remedy="write it without spaces around the equals sign",
            )
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise OptionError(
            f"{type(pipe).__name__} does not take {', '.join(unknown)}",
            expected=f"one of {', '.join(name for name in known if name != 'self')}",
            got=", ".join(unknown),
            remedy="leave it out, or see the pipeline's documentation",
        )
    return arguments


def arguments_for_plan(
    pipe: Any, plan: Plan, named: Mapping[str, object], settings: Sequence[str] | None
) -> dict[str, Any]:
    """Return the arguments that were given, as `pipeline_arguments` does, the plan's for the rest.

    Raises:
        OptionError: as `pipeline_arguments`; the number of steps is neither given nor known.
    """
    arguments = arguments_of_plan(pipe, plan) | pipeline_arguments(pipe, named, settings)
    steps = "num_inference_steps"
    if steps not in arguments and steps in inspect.signature(type(pipe).__call__).parameters:
        raise OptionError(
            "the number of steps is needed",
            expected="--steps: the pipeline has two transformers, and a plan knows those of one",
            got="none",
            remedy="give the number of steps that the plan was calibrated with",
        )
    return arguments


def arguments_of_plan(pipe: Any, plan: Plan) -> dict[str, Any]:
    """Return the size and the number of steps that a plan was made for, where they are known.

    A size in pixels is the latent grid times the patch times the decoder's compression. The steps
    aren't known of a pipeline with two transformers, each of which has some of them.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {}
    if getattr(pipe, "transformer_2", None) is None:
        arguments["num_inference_steps"] = plan.steps
    config = getattr(pipe.transformer, "config", {})
    patch = config.get("patch_size")
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    space = getattr(pipe, "vae_scale_factor_spatial", None)
    ahead = getattr(pipe, "vae_scale_factor_temporal", None)
    if isinstance(patch, list | tuple) and len(patch) == 3 and space and ahead:
        frames, height, width = plan.grid
        arguments |= {
            "height": height * patch[1] * space,
            "width": width * patch[2] * space,
            "num_frames": (frames * patch[0] - 1) * ahead + 1,
        }
    return {name: value for name, value in arguments.items() if name in known}


def _no_device(name: str) -> OptionError:
    import torch

    return OptionError(
        "--device names no device of this machine",
        expected=f"auto, cpu or a CUDA device; this machine has {torch.cuda.device_count()}",
        got=repr(name),
        remedy="leave it out for the default",
    )
