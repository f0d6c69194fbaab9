"""Every exception that calibatt raises, and nothing else.

A message says what was expected, what was got and what to do: `CalibattError` takes the three apart
so that none is forgotten.
"""

from __future__ import annotations

from calibatt_compiler.printable import printable_lines

_INDENT = " " * 12


class CalibattError(Exception):
    """Base of all errors of this package.

    Args:
        problem: what is wrong, in one line.
        expected: what would have been right.
        got: what was there instead.
        remedy: what the reader can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.expected = expected
        self.got = got
        self.remedy = remedy
        lines = [printable_lines(problem, indent=_INDENT)]
        for label, said in (("expected", expected), ("got", got), ("remedy", remedy)):
            if said is not None:
                lines.append(f"  {label + ':':9} {printable_lines(said, indent=_INDENT)}")
        super().__init__("\n".join(lines))


class OptionError(CalibattError):
    """A compile option, a setting or a command-line value is unknown or out of range."""


class PlanError(CalibattError):
    """A plan, or what a plan is made from, is not valid."""


class PlanFormatError(PlanError):
    """A plan file can't be read: cut short, changed, of another schema, or not a plan at all."""


class PlanMismatchError(PlanError):
    """A plan does not belong to this model, this size of video or this sampler."""


class CaptureError(CalibattError):
    """The captured graph lacks what the backend needs, such as the timestep."""


class CalibrationError(CalibattError):
    """A calibration can't start, go on or end in a plan."""


class KernelError(CalibattError):
    """A kernel can't be generated, compiled or launched for these operands."""


class PipelineError(CalibattError):
    """A pipeline, a prompt file or another input of a command is not usable."""


class FileError(CalibattError, OSError):
    """A file or folder can't be read or written: the message names it.

    It is an `OSError` too, and has its `errno` where the system gave one.
    """
