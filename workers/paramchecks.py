"""Checks of a model's parameters: each raises TypeError or ValueError that names the parameter and what was given."""

from __future__ import annotations

from collections.abc import Sequence


def whole(name: str, value: object, low: int, high: int) -> None:
    """A whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value}")


def odd(name: str, value: object, high: int) -> None:
    """An odd number from 1 to high."""
    whole(name, value, 1, high)
    if isinstance(value, int) and value % 2 == 0:
        raise ValueError(f"{name} must be odd, but got {value}")


def number(name: str, value: object, low: float, high: float) -> None:
    """A number from low to high, whole or not; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from {low} to {high}, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value!r}")


def flag(name: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, but got {value!r}")


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """One of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, but got {value!r}")
