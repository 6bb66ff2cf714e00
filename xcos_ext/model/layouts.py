"""Which network a state dict belongs to, told from its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xcos_ext.backbones import IRSE, IResNet
from xcos_ext.io.errors import ModelError
from xcos_ext.io.weights import StrPath

__all__ = ["KNOWN_RECOGNISERS", "irse_name", "recogniser_name", "recogniser_options", "sized_by_embedding"]

#: For messages.
KNOWN_RECOGNISERS = "IR(-SE) 50/100/152, iresnet 18/34/50/100/200 and MobileFaceNet"


def irse_name(state: Mapping[str, Tensor], path: StrPath) -> str:
    """The IR or IR-SE network of a state dict with ``body.*``.

    Raises:
        ModelError: another number of residual units than these networks have.
    """
    units = {int(m.group(1)) for key in state if (m := re.match(r"body\.(\d+)\.", key))}
    depth = next((depth for depth, plan in IRSE.units.items() if sum(plan) == len(units)), None)
    if depth is None:
        raise ModelError(
            f"{path}: an IR network with {len(units)} residual units; known are 24 (IR-50), 49 (IR-100) and 50 (IR-152)"
        )
    squeeze = any(".res_layer.5." in key for key in state)
    return f"ir_se_{depth}" if squeeze else f"ir_{depth}"


def _iresnet_name(state: Mapping[str, Tensor], path: StrPath) -> str:
    units: dict[int, set[int]] = {1: set(), 2: set(), 3: set(), 4: set()}
    for key in state:
        if m := re.match(r"layer([1-4])\.(\d+)\.", key):
            units[int(m.group(1))].add(int(m.group(2)))
    counts = tuple(len(found) for found in units.values())
    depth = next((depth for depth, plan in IResNet.units.items() if plan == counts), None)
    if depth is None:
        known = ", ".join(f"{'-'.join(map(str, plan))} ({depth})" for depth, plan in IResNet.units.items())
        raise ModelError(
            f"{path}: an iresnet with {'-'.join(map(str, counts))} residual units in its stages; known are {known}"
        )
    return f"iresnet{depth}"


def recogniser_name(state: Mapping[str, Tensor], path: StrPath) -> str | None:
    """The architecture whose layout these keys follow, or None.

    Raises:
        ModelError: a layout that is known, at a depth that is not.
    """
    if "conv_6_sep.conv.weight" in state:
        return "mobilefacenet"
    if "gdconv.depthwise.weight" in state or "dw_conv.depthwise.weight" in state:
        return "mobilefacenet_relu"
    if "input_layer.0.weight" in state and any(key.startswith("body.") for key in state):
        return irse_name(state, path)
    # torchvision's residual networks have layer1 too, but no activation with weights.
    if "layer1.0.prelu.weight" in state and "layer1.0.bn3.weight" in state:
        return _iresnet_name(state, path)
    return None


def sized_by_embedding(name: str) -> bool:
    """Whether an architecture takes ``embedding_size``."""
    return name.startswith(("mobilefacenet", "iresnet"))


def recogniser_options(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options that the architecture is to be created with, so that its shapes are those of the weights."""
    if not sized_by_embedding(name):
        return {}
    weights = (state.get(key) for key in ("linear.weight", "conv3.weight", "fc.weight"))
    weight = next((w for w in weights if w is not None), None)
    return {} if weight is None or weight.dim() < 2 else {"embedding_size": int(weight.shape[0])}
