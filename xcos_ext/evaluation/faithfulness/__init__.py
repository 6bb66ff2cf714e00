"""Are explanations true? Protocols that measure it, with controls; see docs/maps.md.

>>> import numpy as np
>>> from types import SimpleNamespace
>>> from torch.nn import AvgPool2d
>>> from xcos_ext.evaluation.datasets import PairList
>>> from xcos_ext.explain.explainers import CentreMap, XCosPairs
>>> from xcos_ext.model import XCosHead, XCosModel
>>> draw = lambda key: np.random.default_rng([*key[:3].encode()]).integers(0, 256, (112, 112, 3), np.uint8)
>>> named, crops = [("Ann/1", "Ann/2"), ("Ann/1", "Bob/1")], SimpleNamespace(read=draw)
>>> faces = Faces(PairList(named, [True, False], person=lambda key: key[:3], pictures=crops))
>>> model = XCosPairs(XCosModel(AvgPool2d(16), XCosHead(3, 8, attention="norm")).eval())
>>> settings = Settings(regions=("nose",), replicates=0)

Each protocol is a function of a study and of explainers:

>>> study, centre = Study(model, faces, settings), [CentreMap()]
>>> region_swap(study, centre).find("centre").difference.value  # a constant map knows nothing of the change
0.5
>>> deletion_verification(study, centre).find("centre", mode="insertion").curve.levels[:3]
(0.0, 0.1, 0.2)
>>> deletion_identification(study, centre).gallery
2
>>> round(locality(study).chance, 4)
0.0204
>>> patch_replacement(study, centre).passed_over
0

All of them, or some, with the controls and what each explainer costs:

>>> found = faithfulness(model, faces, ["xcos-similarity"], protocols=["region-swap"], settings=settings)
>>> found.explainers
('xcos-similarity', 'random', 'centre')
>>> len(faithfulness_figure(found).axes)
6
"""

from .deletion import Deletion, deletion_identification, deletion_verification
from .faces import Faces, TooFewError
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
    "locality",
    "paste",
    "patch_replacement",
    "region_mask",
    "region_swap",
    "to_cells",
    "to_pixels",
]
