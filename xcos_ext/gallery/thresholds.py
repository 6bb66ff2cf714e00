"""Decision thresholds for one against many, from the false match rate of one pair."""

from __future__ import annotations

import math

import numpy as np

from xcos_ext.card.calibration import FMRCurve
from xcos_ext.io.errors import GalleryError

__all__ = ["identification_threshold"]


def identification_threshold(curve: FMRCurve | None, fpir: float, candidates: int) -> float:
    """The score from which on a search of N candidates returns anybody wrongly at most at a stated rate.

    A probe whose person is not enrolled meets N impostors, so FPIR = 1 - (1 - FMR)^N if their scores are independent
    (ISO/IEC 19795-1; the same people again and again are not, and real rates are then lower for most probes and
    higher for some).

    Args:
        curve: the model's false match rate.
        fpir: false positive identification rate, in (0, 1).
        candidates: N, enrolled persons or faces.

    Raises:
        GalleryError: no curve, a wrong rate, or one that the calibration's impostor pairs cannot tell.

    Example:
        >>> curve = FMRCurve((0.0, 0.5), (1.0, 1e-5), (1.0, 2e-5), smallest=1e-5, pairs=10**6)
        >>> [round(identification_threshold(curve, 0.01, candidates), 4) for candidates in (1, 100)]
        [0.2, 0.3998]
    """
    if curve is None:
        raise GalleryError("fpir: expected a calibrated model, got one without a false match rate; give a threshold")
    if not 0 < fpir < 1:
        raise GalleryError(f"fpir: expected a rate between 0 and 1, got {fpir:g}")
    fmr = -math.expm1(math.log1p(-fpir) / max(1, candidates))
    if fmr < curve.smallest:
        largest = -math.expm1(max(1, candidates) * math.log1p(-curve.smallest))
        raise GalleryError(
            f"fpir: expected at least {largest:.2g} for {candidates:,} candidates, got {fpir:g}: it asks for a false "
            f"match rate of {fmr:.2g}, and the calibration's {curve.pairs:,} impostor pairs tell {curve.smallest:.2g} "
            "at best"
        )
    rates = np.log(np.array(curve.rates))
    if math.log(fmr) <= rates[-1]:
        return math.nextafter(curve.scores[-1], math.inf)
    # Rates fall along the curve; the highest score of a rate is the safe one.
    index = int(np.searchsorted(-rates, -math.log(fmr), side="right"))
    if index == 0:
        return curve.scores[0]
    high, low = rates[index - 1], rates[index]
    share = (high - math.log(fmr)) / (high - low)
    return float(curve.scores[index - 1] + share * (curve.scores[index] - curve.scores[index - 1]))
