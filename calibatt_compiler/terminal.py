"""The one way to the terminal: text is shown as it is, without markup and control characters."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment

from calibatt_compiler.printable import printable_lines


class PlainConsole(Console):
    """A console of rich that takes no markup and passes on no control characters but its own.

    Args:
        stderr: write to the error stream.
        soft_wrap: leave lines as long as they are.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(
            stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does; every table, bar and line passes here."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else self._shown(text), style, control)

    def _shown(self, text: str) -> str:
        # What a terminal of another encoding lacks is escaped, too.
        shown = printable_lines(text).encode(self.encoding, "backslashreplace")
        return shown.decode(self.encoding)


def description() -> TextColumn:
    """Return the column of a progress bar that says what is done, as plain text."""
    return TextColumn("{task.description}", markup=False)
