"""Checks of arguments that every model shares."""

from __future__ import annotations


def check_size(name: str, value: int, *, least: int = 1) -> int:
    """The size, which must be a whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {name}={value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {name}={value}")
    return value
