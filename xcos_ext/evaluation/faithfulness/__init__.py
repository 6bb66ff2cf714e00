"""Are explanations true? Protocols that measure it, with controls; see docs/maps.md."""

from .deletion import Deletion, deletion_identification, deletion_verification
from .faces import Faces, TooFewError, fold_numbers
from .locality import Locality, locality
from .maps import areas, to_cells, to_pixels
from .measure import CONTROLS, PROTOCOLS, Faithfulness, faithfulness
from .pasting import REGIONS, SIZES, paste, region_mask
from .patch import Patch, patch_replacement
from .plots import faithfulness_figure
from .study import Settings, Study
from .swap import DIRECTIONS, RegionSwap, region_swap

__all__ = [
    "CONTROLS",
    "DIRECTIONS",
    "PROTOCOLS",
    "REGIONS",
    "SIZES",
    "Deletion",
    "Faces",
    "Faithfulness",
    "Locality",
    "Patch",
    "RegionSwap",
    "Settings",
    "Study",
    "TooFewError",
    "areas",
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
    "to_cells",
    "to_pixels",
]
