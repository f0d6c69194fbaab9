"""Text of plans, prompts, paths and libraries is data: what a terminal or a page may show of it.

A terminal obeys control characters (some write to the clipboard), and bidirectional ones make a
line read otherwise than it is. They are shown as escapes instead.
"""

from __future__ import annotations

import html
import logging
import unicodedata

_JOINERS = "\u200c\u200d"
"""Invisible, but part of how some scripts and emoji are written."""

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: object) -> str:
    """Return `str(text)` as one line: control, bidirectional and broken characters as escapes."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(map(_shown, found))


def printable_lines(text: object, *, indent: str = "") -> str:
    """Return the same, its lines kept, those after the first behind `indent`."""
    return f"\n{indent}".join(printable(line) for line in str(text).split("\n"))


def escape(text: object) -> str:
    """Return `printable(text)` for HTML: as text, or as the value of an attribute in quotes."""
    return html.escape(printable(text))


def clean_record(record: logging.LogRecord) -> bool:
    """Make what is logged printable; a filter of the logger `calibatt`."""
    record.msg, record.args = printable_lines(record.getMessage(), indent="  "), ()
    return True


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return ascii(character)[1:-1]
