"""Where networks and operators run: the device that a name stands for, once it has shown that it can."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import DeviceError
from xcos_ext.io.text import first_line

if TYPE_CHECKING:
    import torch

__all__ = ["check_device_name", "choose_device", "module_device"]

_NAMES = re.compile(r"auto|cpu|cuda(?::(?P<index>[0-9]{1,8}))?")


def check_device_name(name: str) -> int | None:
    """Refuse a name that stands for no device; torch is not imported.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns:
        N; None where there is none.

    Raises:
        DeviceError: another name.

    >>> check_device_name("cuda:1")
    1
    """
    found = _NAMES.fullmatch(name)
    if found is None:
        raise DeviceError(f"device: expected cpu, cuda, cuda:N or auto, got {name!r}")
    index = found["index"]
    return None if index is None else int(index)


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device that a name stands for, where torch and this library's operators have just run.

    Args:
        name: ``"cpu"``; ``"cuda"``, torch's current GPU; ``"cuda:N"``; or ``"auto"``: ``"cuda"`` if it can be used,
            else ``"cpu"``. Where there is a GPU that cannot be used, ``"auto"`` warns and says why.

    Returns:
        A GPU with its number.

    Raises:
        DeviceError: another name, or a GPU that was asked for and cannot be used.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    asked = str(name)
    index = check_device_name(asked)
    import torch

    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    why = _obstacle(index)
    if why is None:
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    if asked != "auto":
        raise DeviceError(f"device: expected a GPU that can be used, got {asked!r}: {why}")
    warnings.warn(f"the GPU is not used, the CPU computes: {why}", stacklevel=2)
    return torch.device("cpu")


def module_device(module: Any) -> torch.device:
    """Where a network's tensors are; the CPU if it has none, or is no network.

    >>> import torch
    >>> module_device(torch.nn.Linear(2, 1))
    device(type='cpu')
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        return torch.device("cpu")
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _obstacle(index: int | None) -> str | None:
    """Why a GPU (None: torch's current one) cannot be used; None: it can."""
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) sees no GPU"
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        return "torch sees one GPU, cuda:0" if count == 1 else f"torch sees {count} GPUs, cuda:0 to cuda:{count - 1}"
    try:
        device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        return f"torch cannot compute on it ({first_line(error)})"
    from xcos_ext.ops import build_info, xcos_score

    built = build_info()
    if not built["cuda"]:
        return "xcos_ext was built without CUDA kernels (it needs nvcc when it is built)"
    try:
        # A trial knows better than a comparison of version numbers what a GPU, a driver and these binaries can do.
        maps = torch.ones(1, 1, 1, 1, device=device)
        xcos_score(maps, maps).item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"the CUDA kernels of xcos_ext were built for {built['cuda_architectures']} and do not run on "
            f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor} ({first_line(error)})"
        )
    return None
