"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .mobilefacenet import MobileFaceNet, MobileFaceNetReLU
from .recogniser import Recogniser
from .residual import IRSE, IResNet
from .slim import SlimFaceNet

__all__ = ["available", "create", "register"]

_REGISTRY: dict[str, Callable[..., Recogniser]] = {}


def register(name: str, factory: Callable[..., Recogniser]) -> None:
    """Add a backbone to the registry, so that its models can be saved and loaded by name.

    Args:
        name: the name; also what the built network must carry as ``architecture``.
        factory: called with the keyword arguments of :func:`create`; must accept ``output=True/False``.

    Raises:
        ValueError: the name is taken.

    >>> register("slim of a friend", SlimFaceNet)
    >>> "slim of a friend" in available()
    True
    >>> _REGISTRY.pop("slim of a friend").__name__  # this example leaves nothing behind
    'SlimFaceNet'
    """
    if name in _REGISTRY:
        raise ValueError(f"name: {name!r} is already registered")
    _REGISTRY[name] = factory


def available() -> tuple[str, ...]:
    """Names that :func:`create` accepts, sorted.

    >>> "ir_se_50" in available()
    True
    """
    return tuple(sorted(_REGISTRY))


def create(name: str, **options: Any) -> Recogniser:
    """Build a backbone with freshly initialised weights.

    Args:
        name: one of :func:`available`, e.g. ``"ir_se_50"`` or ``"mobilefacenet"``.
        **options: passed on to the network, e.g. ``output=False`` to leave out the output block.

    Returns:
        The network, in training mode like every new torch module.

    Raises:
        ValueError: no such name.

    >>> create("slim").eval().grid_shape
    (512, 7, 7)
    """
    factory = _REGISTRY.get(name)
    if factory is None:
        raise ValueError(f"name: expected one of {', '.join(available())}, got {name!r}")
    return factory(**options)


for _depth in IResNet.units:
    register(f"iresnet{_depth}", partial(IResNet, _depth))
for _depth in IRSE.units:
    register(f"ir_{_depth}", partial(IRSE, _depth, squeeze=False))
    register(f"ir_se_{_depth}", partial(IRSE, _depth, squeeze=True))
register("mobilefacenet", MobileFaceNet)
register("mobilefacenet_relu", MobileFaceNetReLU)
register("slim", SlimFaceNet)
