"""Figures as people read them: three digits and a prefix."""

from __future__ import annotations


def human(number: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 6738415616 is "6.74G"; with the unit "B", "6.74 GB"."""
    digits, prefix = _scaled(number, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
    return f"{digits} {prefix}{unit}" if unit else digits + prefix


def human_count(number: float) -> str:
    """As model sizes are written, in thousands, millions, billions, trillions: 6738415616 is "6.74B"."""
    return "".join(_scaled(number, ("", "k", "M", "B", "T")))


def _scaled(number: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    value, step = float(number), 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:  # 999.5 would round to 1000
        value, step = value / 1000, step + 1
    return f"{value:.3g}", prefixes[step]
