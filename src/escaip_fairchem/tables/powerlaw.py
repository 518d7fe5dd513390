"""Power laws of error against size, and when data do not support one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    Interval = tuple[float, float]

#: Fewest different sizes of a power law, and of one with an offset.
SIZES, SIZES_WITH_OFFSET = 3, 4
_CONFIDENCE = 0.95
#: Below this relative sum of squares the points lie on the law but for rounding.
_EXACT = 1e-12


@dataclass(frozen=True)
class Fit:
    """error = offset + factor * size^-exponent, errors of fit relative.

    Attributes:
        supported: Whether the data support a fall with the size.
        offset: Error at infinite size; 0 where the data do not support one.
        factor: Error at size 1 above the offset.
        exponent: How fast errors fall.
        exponent_range: Interval of 95 % of the exponent.
        offset_range: Interval of 95 % of the offset, if there is one.
        verdict: In words.
    """

    supported: bool
    offset: float = 0.0
    factor: float = float("nan")
    exponent: float = float("nan")
    exponent_range: Interval | None = None
    offset_range: Interval | None = None
    verdict: str = ""

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Error at sizes."""
        return self.offset + self.factor * np.asarray(sizes, float) ** -self.exponent


def fit(sizes: Sequence[float], errors: Sequence[float]) -> Fit:
    """Fit errors against sizes, by least squares of the logarithms.

    A pure power law is a straight line there; its exponent counts if Student's interval of 95 %
    excludes zero. An offset counts if it lowers the residuals more than one parameter would by
    chance (F test, 5 %); intervals are then from the covariance at the optimum.

    Args:
        sizes: Positive; several errors at one size (seeds) are fine.
        errors: Positive.
    """
    n, y = np.asarray(sizes, float), np.asarray(errors, float)
    known = np.isfinite(y) & (y > 0) & (n > 0)
    n, y = n[known], np.log(y[known])
    distinct = len(np.unique(n))
    if distinct < SIZES:
        return Fit(False, verdict=f"{distinct} sizes; a power law needs {SIZES}")
    middle = np.exp(np.log(n).mean())  # sizes relative to it: factor and exponent decouple
    x = np.log(n / middle)
    line = stats.linregress(x, y)
    exponent = -line.slope
    spread = stats.t.ppf(0.5 + _CONFIDENCE / 2, len(y) - 2) * line.stderr
    between = exponent - spread, exponent + spread
    factor = float(np.exp(line.intercept) * middle**exponent)
    shown = f"exponent {exponent:.3g} ({between[0]:.3g} to {between[1]:.3g})"
    if between[0] <= 0:
        return Fit(
            False, 0.0, factor, exponent, between, None,
            f"not supported: {shown}, an interval of 95 % that holds zero",
        )  # fmt: skip
    pure = Fit(True, 0.0, factor, exponent, between, None, f"power law, {shown}")
    if distinct < SIZES_WITH_OFFSET or len(y) < SIZES_WITH_OFFSET + 1:
        return _with(pure, f"; an offset needs {SIZES_WITH_OFFSET} sizes and more points")
    return _offset(pure, x, y, middle, start=(line.intercept, exponent))


def _offset(pure: Fit, x: np.ndarray, y: np.ndarray, middle: float, start) -> Fit:
    """The law with an offset if it is significantly better, else the pure one."""
    rest = ((y - np.log(pure(middle * np.exp(x)))) ** 2).sum()
    if rest < _EXACT * len(y):
        return _with(pure, "; no offset")

    def law(x, offset, factor, exponent):
        return np.log(offset + factor * np.exp(-exponent * x))

    try:
        found, covariance = optimize.curve_fit(
            law, x, y,
            p0=(0.5 * np.exp(y.min()), 0.5 * np.exp(start[0]), 1.5 * start[1]),
            bounds=([0, 1e-300, 1e-6], [np.exp(y.min()), np.inf, 20]), max_nfev=20_000,
        )  # fmt: skip
    except RuntimeError:  # no convergence
        return _with(pure, "; a fit with an offset does not converge")
    offset, factor, exponent = found
    left = max(((y - law(x, *found)) ** 2).sum(), _EXACT * _EXACT)
    free = len(y) - 3
    chance = stats.f.sf(max(rest - left, 0) / (left / free), 1, free)
    if chance > 1 - _CONFIDENCE:
        return _with(pure, f"; no offset is supported (p = {chance:.2g})")
    spread = stats.t.ppf(0.5 + _CONFIDENCE / 2, free) * np.sqrt(np.diag(covariance))
    of_offset = max(0.0, offset - spread[0]), offset + spread[0]
    of_exponent = exponent - spread[2], exponent + spread[2]
    return Fit(
        True, offset, factor * middle**exponent, exponent, of_exponent, of_offset,
        f"offset {offset:.3g} ({of_offset[0]:.3g} to {of_offset[1]:.3g}) and power law, exponent "
        f"{exponent:.3g} ({of_exponent[0]:.3g} to {of_exponent[1]:.3g})",
    )  # fmt: skip


def _with(pure: Fit, remark: str) -> Fit:
    return Fit(**{**vars(pure), "verdict": pure.verdict + remark})
