"""Whether a module computes what its class says and nothing else, so that something else may compute it instead."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import type_before_parametrizations

__all__ = ["altered", "altered_part", "backward_hook", "batch_statistics", "hooked_globally"]

Kinds = tuple[type[nn.Module], ...]


def altered(module: nn.Module, kinds: Kinds = ()) -> str | None:
    """What was done to a module so that calling it gives more than its class's forward over its tensors, in words.

    Args:
        module: e.g. a layer.
        kinds: classes that it may be of; a subclass is none of them. Without any, whatever it is will do.

    Returns:
        ``"a forward hook"``, ``"ReLU"`` where PReLU was asked for, and so on; None: it is as it was built.

    >>> layer = nn.Conv2d(3, 8, 3)
    >>> altered(layer, (nn.Conv2d,)), altered(layer, (nn.Linear,))
    (None, 'Conv2d')
    >>> handle = layer.register_forward_hook(print)
    >>> altered(layer)
    'a forward hook'
    """
    # From the dictionary: this is asked of a dozen modules for every pair that is scored.
    own = module.__dict__
    if kinds and type(module) not in kinds:
        plain = type_before_parametrizations(module)
        return plain.__name__ if plain is type(module) else f"a parametrised {plain.__name__}"
    if own["_forward_hooks"]:
        return "a forward hook"
    if own["_forward_pre_hooks"]:
        return "a forward pre-hook"
    # The second one is how convolutions are commonly made to wrap around.
    return "a forward of its own" if "forward" in own or "_conv_forward" in own else None


def backward_hook(module: nn.Module) -> str | None:
    """What changes the gradients through a module, but no value, in words; or None."""
    return "a backward hook" if module._backward_hooks or module._backward_pre_hooks else None


def hooked_globally() -> str | None:
    """Whether every module has a hook (``torch.nn.modules.module.register_module_forward_hook``), in words; or None."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "a forward hook of all modules"
    return "a backward hook of all modules" if _global_backward_hooks or _global_backward_pre_hooks else None


def altered_part(module: nn.Module) -> str | None:
    """The first of a module and its parts that has a hook or a forward of its own, and what it has; None: none has.

    >>> altered_part(nn.Sequential(nn.ReLU())) is None
    True
    """
    found = hooked_globally()
    for path, part in module.named_modules():
        if found is None and (what := altered(part) or backward_hook(part)):
            found = f"{path or type(part).__name__}: {what}"
    return found


def batch_statistics(module: nn.Module) -> str | None:
    """The first batch norm without running statistics, which makes a picture's result depend on the others of its
    batch even in evaluation mode, in words; or None.

    >>> batch_statistics(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    '0: batch norm without running statistics'
    """
    for path, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            return f"{path or type(part).__name__}: batch norm without running statistics"
    return None
