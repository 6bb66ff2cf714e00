"""Verification figures and the protocols that produce them."""

from .calibration import all_pair_scores, calibrate
from .verification import (
    EER,
    ErrorCurves,
    KFoldAccuracy,
    OperatingPoint,
    VerificationReport,
    auc,
    best_threshold,
    eer,
    error_curves,
    fmr_threshold,
    fmr_upper_bound,
    kfold_accuracy,
    operating_point,
    verification,
)

__all__ = [
    "EER",
    "ErrorCurves",
    "KFoldAccuracy",
    "OperatingPoint",
    "VerificationReport",
    "all_pair_scores",
    "auc",
    "best_threshold",
    "calibrate",
    "eer",
    "error_curves",
    "fmr_threshold",
    "fmr_upper_bound",
    "kfold_accuracy",
    "operating_point",
    "verification",
]
