"""Verification and identification figures, and the protocols that produce them."""

from .bootstrap import Resampling, bootstrap
from .figures import Estimate
from .fmr import all_pair_scores, calibrate, fmr_curve
from .identification import (
    Candidates,
    IdentificationReport,
    average_identification,
    identification,
    ranked_persons,
)
from .protocol import Evaluation, corr_attention, evaluate
from .roc import roc_figure
from .scoring import score_pairs
from .verification import (
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
    "Candidates",
    "Estimate",
    "Evaluation",
    "IdentificationReport",
    "Resampling",
    "VerificationReport",
    "all_pair_scores",
    "auc",
    "average_identification",
    "best_threshold",
    "bootstrap",
    "calibrate",
    "corr_attention",
    "eer",
    "error_curves",
    "evaluate",
    "fmr_curve",
    "fmr_threshold",
    "fmr_upper_bound",
    "identification",
    "kfold_accuracy",
    "operating_point",
    "ranked_persons",
    "roc_figure",
    "score_pairs",
    "verification",
]
