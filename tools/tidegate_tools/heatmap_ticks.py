"""Where the axes of heatmap_png.py have their ticks, and what stands there. No I/O."""

from __future__ import annotations

import math
import time
from typing import Final

_MOST: Final = 9  # ticks of time side by side, and of colours one above the other
_DAY_S: Final = 86_400
_STEPS_S: Final = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60 * one for one in (1, 2, 5, 10, 15, 30)),
    *(3600 * one for one in (1, 2, 3, 6, 12)),
)


def times(start: float, seconds: float) -> tuple[list[float], list[str]]:
    """Round clock times from `start` (Unix time) on, as seconds since then, and their texts."""
    most = _MOST - 1
    step = next((one for one in _STEPS_S if seconds / one <= most), 0)
    step = step or math.ceil(seconds / most / _DAY_S) * _DAY_S
    shift = time.localtime(start).tm_gmtoff  # for what is longer than the zones' quarters of an hour
    first = math.ceil((start + shift) / step - 1e-6)
    places, texts = [], []
    for number in range(first, first + _MOST):
        at = number * step - shift
        if at > start + seconds + 1e-6:
            break
        places.append(at - start)
        texts.append(_clock(at, step))
    return places, texts


def _clock(at: float, step: float) -> str:
    tenths = round(at * 10)
    form = "%m-%d" if step >= _DAY_S else "%H:%M:%S"
    text = time.strftime(form, time.localtime(tenths // 10))
    return f"{text}.{tenths % 10}" if step < 1 else text


def rates(low: float, high: float) -> tuple[list[float], list[str]]:
    """Plain numbers between two rates greater than 0, for a log scale, and their texts."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    found = [one for one in found if low * 0.999 <= one <= high * 1.001]
    if len(found) > _MOST:
        found = [one for one in found if math.isclose(math.log10(one), round(math.log10(one)))]
    if len(found) < 4 and math.floor(high) - math.ceil(low) < _MOST:
        found = [float(one) for one in range(math.ceil(low), math.floor(high) + 1)] or found
    found = found or [low]
    return found, [f"{one:.0f}" if one >= 10 or one == int(one) else f"{one:.3g}" for one in found]
