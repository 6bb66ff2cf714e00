"""Verification figures and the protocols that produce them."""

from .bootstrap import Interval, Resampling, bootstrap
from .calibration import all_pair_scores, calibrate, fmr_curve
from .protocol import Evaluation, Variant, corr_attention, cross_validated, evaluate
from .roc import roc_figure
from .scoring import ATTENTIONS, Scores, score_model, score_pairs
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
    "ATTENTIONS",
    "EER",
    "ErrorCurves",
    "Evaluation",
    "Interval",
    "KFoldAccuracy",
    "OperatingPoint",
    "Resampling",
    "Scores",
    "Variant",
    "VerificationReport",
    "all_pair_scores",
    "auc",
    "best_threshold",
    "bootstrap",
    "calibrate",
    "corr_attention",
    "cross_validated",
    "eer",
    "error_curves",
    "evaluate",
    "fmr_curve",
    "fmr_threshold",
    "fmr_upper_bound",
    "kfold_accuracy",
    "operating_point",
    "roc_figure",
    "score_model",
    "score_pairs",
    "verification",
]
