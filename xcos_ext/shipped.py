"""Files that come with the package; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from xcos_ext.errors import ModelError

__all__ = ["DATA", "default_weights"]

#: Folder of the files.
DATA = Path(__file__).resolve().parent / "data"

_DEFAULT_WEIGHTS = DATA / "xcos_compact.safetensors"


def default_weights() -> Path:
    """The file of the model that the package ships: compact, trained by its own scripts (docs/default_model.md).

    Raises:
        ModelError: the package was installed without it.
    """
    if not _DEFAULT_WEIGHTS.is_file():
        raise ModelError(
            f"no model: {_DEFAULT_WEIGHTS} is missing from this installation; name another one. Suitable are an xCos "
            "checkpoint (github.com/ntubiolin/xcos) or the weights of an IR, IR-SE or MobileFaceNet recogniser "
            "(github.com/TreB1eN/InsightFace_Pytorch has some)"
        )
    return _DEFAULT_WEIGHTS
