"""Are explanations true? Protocols that measure it, with controls; see docs/maps.md."""

from xcos_ext.explain.fills import FILLS

from .curves import Curve, areas, standardised
from .deletion import Deletion, DeletionRow, deletion_identification, deletion_verification
from .faces import Drawn, Faces, TooFewError, fold_numbers
from .locality import Locality, LocalityRow, locality
from .maps import to_cells, to_pixels
from .measure import CONTROLS, PROTOCOLS, Faithfulness, Timing, default_explainers, faithfulness
from .patch import Patch, PatchRow, patch_replacement
from .plots import faithfulness_figure
from .regions import REGIONS, SIZES, Pasted, paste, region_mask
from .study import DIRECTIONS, Settings, Study
from .swap import PASTES, RegionSwap, SwapDraw, SwapRow, region_swap

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
    "Faces",
    "Faithfulness",
    "Locality",
    "LocalityRow",
    "Pasted",
    "Patch",
    "PatchRow",
    "RegionSwap",
    "Settings",
    "Study",
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
