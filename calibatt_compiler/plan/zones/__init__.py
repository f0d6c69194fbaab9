"""Octave zones: rates of a half, a quarter and so on in runs of key blocks, drawn by a formula."""

from calibatt_compiler.plan.zones.pattern import ZonePattern

__all__ = ["ZonePattern"]
