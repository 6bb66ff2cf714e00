"""Are explanations true? Protocols that measure it, with controls; see docs/faithfulness.md."""

from xcos_ext.explain.fills import FILLS

from .deletion import Deletion, DeletionRow, deletion_identification, deletion_verification
from .faces import Drawn, Faces, TooFewError, fold_numbers
from .locality import Locality, LocalityRow, locality
from .patch import Patch, PatchRow, patch_replacement
from .plots import faithfulness_figure
from .regions import REGIONS, SIZES, Pasted, paste, region_mask
from .resolution import to_cells, to_pixels
from .runner import CONTROLS, PROTOCOLS, Faithfulness, Settings, Timing, default_explainers, faithfulness
from .statistics import Curve, Estimator, areas, standardised
from .swap import DIRECTIONS, PASTES, RegionSwap, SwapDraw, SwapRow, region_swap

__all__ = [
    "CONTROLS",
    "DIRECTIONS",
    "FILLS",
    "PASTES",
    "PROTOCOLS",
    "REGIONS",
    "SIZES",
    "Curve",
    "Deletion",
    "DeletionRow",
    "Drawn",
    "Estimator",
    "Faces",
    "Faithfulness",
    "Locality",
    "LocalityRow",
    "Pasted",
    "Patch",
    "PatchRow",
    "RegionSwap",
    "Settings",
    "SwapDraw",
    "SwapRow",
    "Timing",
    "TooFewError",
    "areas",
    "default_explainers",
    "deletion_identification",
    "deletion_verification",
    "faithfulness",
    "faithfulness_figure",
    "fold_numbers",
    "locality",
    "paste",
    "patch_replacement",
    "region_mask",
    "region_swap",
    "standardised",
    "to_cells",
    "to_pixels",
]
