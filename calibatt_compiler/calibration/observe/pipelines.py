"""How a diffusers pipeline is run on inputs while its transformer is observed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex

import torch

from calibatt_compiler.arguments import described, known
from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.observe.observation import Branch, SamplerSchedule
from calibatt_compiler.calibration.observe.observer import ObservedModel, Observer
from calibatt_compiler.errors import CalibattError, CalibrationError, OptionError, PipelineError
from calibatt_compiler.logs import logger
from calibatt_compiler.model.families import unwrap

log = logger("calibration")

Prompt = str | Mapping[str, Any]


class FirstStepDone(Exception):  # noqa: N818 - no error: it ends an input early
    """Ends an input after its first step."""


_TAKEN = ("generator", "callback_on_step_end")
"""Arguments of a pipeline that a calibration sets itself."""


def read_inputs(
    prompts: Sequence[Prompt],
    seeds: int | Sequence[int],
    arguments: Mapping[str, Any],
    pipe: object = None,
) -> list[tuple[int, dict[str, Any]]]:
    """Return the seed of each input, and its arguments that are not those of all inputs.

    Args:
        prompts: see `calibrate`.
        seeds: see `calibrate`.
        arguments: of the pipeline, common to all inputs.
        pipe: the pipeline, whose call must know each argument; None if it is not at hand.

    Raises:
        OptionError: prompts, seeds or arguments that can't be used.
    """
    texts = isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes))
    if not texts or not prompts or not all(isinstance(p, (str, Mapping)) for p in prompts):
        raise OptionError(
            "calibration needs prompts",
            expected="a list of at least one prompt",
            got=described(prompts),
            remedy='pass prompts=["...", "..."]; the paper takes 16 to 64 of them',
        )
    own = [name for p in prompts if isinstance(p, Mapping) for name in p if name in _TAKEN]
    taken = ({"prompt", *_TAKEN} & set(arguments)) | set(own)
    if taken:
        raise OptionError(
            f"calibration sets {', '.join(sorted(taken))} itself",
            expected="arguments that all inputs share: size, steps, guidance",
            got=sorted(arguments),
            remedy="use prompts=... and seeds=...; arguments that differ between inputs go into "
            'prompts as mappings: {"prompt": ..., "image": ...}',
        )
    if isinstance(seeds, (bool, str, bytes)) or not isinstance(seeds, (int, Sequence)):
        raise OptionError(
            "seeds are not usable",
            expected="an integer, or one for each prompt",
            got=repr(seeds),
            remedy="pass seeds=0",
        )
    numbers = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
    if len(numbers) != len(prompts):
        raise OptionError(
            "seeds don't match the prompts",
            expected=f"{len(prompts)} seeds, or one number",
            got=f"{len(numbers)} seeds",
            remedy="pass one seed for each prompt; repeat a prompt to use it with several seeds",
        )
    numbers = [_seed(number) for number in numbers]
    varying = [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
    if pipe is not None:
        _check_arguments(pipe, {*arguments, *(name for one in varying for name in one)})
    return list(zip(numbers, varying, strict=True))


def _check_arguments(pipe: object, names: Iterable[str]) -> None:
    """Raise `OptionError` for an argument that a pipeline does not take."""
    try:
        taken = inspect.signature(type(pipe).__call__).parameters
    except (TypeError, ValueError):
        return
    if any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        return
    all_names = [name for name in taken if name != "self"]
    kind = type(pipe).__name__
    known(sorted(map(str, names)), all_names, lambda name: f"{kind} does not take {name!r}")


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        number = None
    else:
        number = value.__index__()
    if number is None or not -(2**63) <= number < 2**64:
        raise OptionError(
            "a seed is not usable",
            expected="an integer of 64 bits",
            got=repr(value),
            remedy="pass seeds=0, or a list of integers",
        )
    return number


def component_of(pipe: Any, name: str) -> torch.nn.Module:
    """Return the module of a pipeline that is to be observed, not its compiled wrapper.

    Raises:
        CalibrationError: the pipeline has no such module, or no scheduler.
    """
    module = getattr(pipe, name, None)
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(module, torch.nn.Module) or scheduler is None or not callable(pipe):
        raise CalibrationError(
            f"{type(pipe).__name__} can't be calibrated",
            expected=f"a diffusers pipeline with a scheduler and a module {name!r}",
            got=f"{name}: {type(module).__name__}, scheduler: {type(scheduler).__name__}",
            remedy="name the denoiser with CalibrationConfig(component=...), or use "
            "calibatt_compiler.calibration(module) for a module without a pipeline",
        )
    return unwrap(module)


def schedule_of(scheduler: Any) -> SamplerSchedule | None:
    """Return the steps that a scheduler is set to, or None before it is set."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    values = [float(value) for value in timesteps]
    distinct = tuple(dict.fromkeys(values))
    sigmas = getattr(scheduler, "sigmas", None)
    levels: tuple[float, ...] | None = None
    if sigmas is not None and len(sigmas) in (len(values), len(values) + 1):
        levels = tuple(float(sigmas[values.index(value)]) for value in distinct)
    return SamplerSchedule(timesteps=distinct, sigmas=levels, name=type(scheduler).__name__)


def samples_of(arguments: Mapping[str, Any]) -> int | None:
    """Return how many videos a call with these arguments makes, if they say so for certain.

    Only `latents` do: pipelines read prompts and `num_videos_per_prompt` each in its own way
    (CogVideoX makes one video whatever the latter is). Noise that a pipeline draws by itself tells
    its samples apart; see `Branch`.
    """
    latents = arguments.get("latents")
    return len(latents) if isinstance(latents, torch.Tensor) and latents.dim() else None


def generate(pipe: Any, seed: int, arguments: Mapping[str, Any]) -> Any:
    """Run the pipeline on one input, to latents unless the arguments say otherwise.

    Raises:
        PipelineError: the pipeline refuses its arguments, or fails.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with failures_named(pipe):
        return pipe(**{"output_type": "latent", **arguments, "generator": generator})


@contextmanager
def failures_named(pipe: object) -> Iterator[None]:
    """Turn what a pipeline raises into an error of ours, with its cause; ours go through."""
    try:
        yield
    except (CalibattError, FirstStepDone):
        raise
    except Exception as error:
        text = str(error).strip() or "no message"
        raise PipelineError(
            f"{type(pipe).__name__} failed",
            expected="a pipeline that makes a video of these prompts and arguments",
            got=f"{type(error).__name__}: {text}",
            remedy="run the pipeline by itself with the same arguments; what was finished before "
            "is kept",
        ) from error


@contextmanager
def branches(
    module: torch.nn.Module, calls_are: Callable[[Branch], AbstractContextManager[None]]
) -> Iterator[None]:
    """Learn each call's branch from the `cache_context` that diffusers pipelines enter.

    Args:
        module: the transformer.
        calls_are: entered around calls, with their branch.
    """
    original = getattr(module, "cache_context", None)

    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with original(name, *args, **kwargs), calls_are(branch_of(name)):  # type: ignore[misc]
            yield

    with calls_are("unknown"):
        if original is None:
            log.info(
                "%s has no cache_context: the first call at each timestep is taken for the "
                "conditional branch",
                type(module).__name__,
            )
            yield
            return
        object.__setattr__(module, "cache_context", cache_context)
        try:
            yield
        finally:
            object.__delattr__(module, "cache_context")


def branch_of(context: str) -> Branch:
    """Return the branch that a diffusers cache context stands for.

    The names in use are `cond`, `uncond`, `cond_uncond` (one batch of both) and, with guiders,
    `pred_cond`, `pred_uncond`; other `uncond_*` are perturbed branches, which are not observed.
    """
    if context == "cond_uncond":  # entered with guidance off too
        return "paired"
    return "unconditional" if "uncond" in context else "conditional"


@contextmanager
def in_place(pipe: Any, name: str, module: torch.nn.Module) -> Iterator[None]:
    """Let the pipeline call the module itself where it holds a compiled wrapper of it."""
    held = getattr(pipe, name)
    if held is module:
        yield
        return
    setattr(pipe, name, module)
    try:
        yield
    finally:
        setattr(pipe, name, held)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Turn the pipeline's own progress bar off."""
    missing = object()
    previous = getattr(pipe, "_progress_bar_config", missing)
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if previous is missing:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = previous


@dataclass(frozen=True, kw_only=True)
class ObservedPipeline(ObservedModel):
    """A component of a diffusers pipeline that is observed while the pipeline generates.

    Attributes:
        pipe: the pipeline.
    """

    pipe: Any

    @classmethod
    def of(cls, pipe: Any, config: CalibrationConfig) -> Self:
        """Return the component that the settings name; steps are those of the scheduler.

        Raises:
            CalibrationError: the pipeline has no such module, or no scheduler.
        """
        return cls(
            pipe=pipe,
            module=component_of(pipe, config.component),
            config=config,
            schedule=lambda: schedule_of(pipe.scheduler),
        )

    @contextmanager
    def shown_to(self, observer: Observer) -> Iterator[None]:
        """Let the pipeline's calls be observed, without its progress bars; undo it at the end."""
        with (
            quiet(self.pipe),
            in_place(self.pipe, self.config.component, self.module),
            super().shown_to(observer),
            branches(self.module, observer.calls_are),
            torch.no_grad(),
        ):
            yield
