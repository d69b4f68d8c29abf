"""Quantities as text: bytes, durations, rates, losses and shares."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal


def format_bytes(n_bytes: float) -> str:
    """Bytes in decimal units.

    Example:
        >>> format_bytes(1_234_567)
        '1.2 MB'
    """
    if abs(n_bytes) < 999.5:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if abs(n_bytes) < 999.95:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} TB"


def format_seconds(time_s: float) -> str:
    """A duration as a clock shows it; tenths where a clock would show next to nothing.

    Example:
        >>> format_seconds(4.21), format_seconds(41), format_seconds(3723)
        ('4.2 s', '0:41', '1:02:03')
    """
    if time_s < 9.95:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_rate(per_s: float) -> str:
    """Two figures for slow rates, whole numbers for fast ones."""
    return f"{per_s:.0f}" if per_s >= 9.95 else f"{per_s:.2g}"


def format_loss(loss: float) -> str:
    """Four decimals, or powers of ten for a loss that has exploded; at most seven characters while positive."""
    return f"{loss:.4f}" if abs(loss) < 99.99995 else f"{loss:.2g}"


def format_number(value: float) -> str:
    """Four significant digits, whatever the magnitude.

    Example:
        >>> format_number(0.0123456), format_number(1234567.0)
        ('0.01235', '1.235e+06')
    """
    return f"{value:.4g}"


def format_score(score: float) -> str:
    """Three decimals of a metric between -1 and 1.

    Example:
        >>> format_score(-0.0617), format_score(1.0)
        ('-0.062', '1.000')
    """
    return f"{score:.3f}"


def format_share(fraction: float) -> str:
    """A fraction of one in percent.

    Example:
        >>> format_share(0.4567)
        '45.7%'
    """
    return f"{fraction:.1%}"


def format_epsilon(epsilon: float, digits: int = 4) -> str:
    """Some significant digits, rounded up: an upper bound must not be printed as a smaller number.

    Example:
        >>> format_epsilon(13.4811), format_epsilon(0.00123401), format_epsilon(float("inf"))
        ('13.49', '0.001235', 'inf')
    """
    if not math.isfinite(epsilon) or epsilon <= 0:
        return f"{epsilon:g}"
    exact = Decimal(epsilon)
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() + 1 - digits), ROUND_CEILING):f}"
