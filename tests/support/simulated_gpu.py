"""A GPU that is none: tensors that say they are on ``cuda:0``, compute on the CPU, and refuse to be mixed.

What torch refuses on a real GPU is refused here: an operation on tensors of both devices (but for numbers and indices)
and ``numpy()`` of what was not brought back. It shows that code never mixes devices; of kernels it says nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda:0")
_aten = torch.ops.aten
# The only ones that take tensors of two devices: copies, and indices from the CPU.
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class OnGpu(torch.Tensor):
    """A tensor on the GPU; ``held`` is where it really is."""

    held: torch.Tensor
    operations = 0

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        shape, strides, offset = held.shape, held.stride(), held.storage_offset()
        # To C++ they are on the device meta: a torch without CUDA does not even make views of tensors on a GPU.
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=offset, dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def __getitem__(self, index: Any) -> Any:
        # C++ would put the numbers of a list on meta, where they are lost; so would new_tensor.
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def new_tensor(self, data: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype).to(GPU)

    def record_stream(self, stream: Any) -> None: ...

    def tolist(self) -> Any:
        return self.held.tolist()  # from a real GPU too

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = made
        return made  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    assert not any(t.is_meta for t in tensors if not isinstance(t, OnGpu)), f"{func}: the simulation lost numbers"
    device = kwargs.get("device")
    kind = None if device is None else torch.device(device).type
    onto = bool(there) if kind is None else kind in ("cuda", "meta")  # this package has nothing else on meta
    if func is _aten.copy_.default:
        onto = isinstance(args[0], OnGpu)
    elif there and func not in _COPIES:
        here = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
        if func in _INDEXED:
            here = [t for t in here if not any(t is index for index in args[1] if index is not None)]
        if here:
            raise RuntimeError(f"{func}: tensors on cuda:0 and cpu")
    held = {id(tensor.held): tensor for tensor in there}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
    if onto and device is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    if func is _aten.mm.dtype:  # half precision in, fp32 out: GPUs alone have it
        func, args = _aten.mm.default, tuple(x.to(args[2]) for x in args[:2])
    made = func(*args, **kwargs)
    OnGpu.operations += onto

    def placed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, OnGpu) or not onto:
            return x
        return held.get(id(x)) if id(x) in held else OnGpu(x)

    if func is _aten._to_copy.default and any(made is x for x in (*tensors, *(t.held for t in there))):
        made = made.clone()
    return tree_map(placed, made)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Stream:
    def __init__(self, *args: Any) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Gives the device; ``choose_device`` finds it as it would a real one that can do everything."""
    import xcos_ext.ops
    from xcos_ext.gallery import stream

    built = xcos_ext.ops.build_info() | {"cuda": True, "cuda_architectures": "90"}
    monkeypatch.setattr(xcos_ext.ops, "build_info", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "Simulated",
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda of: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Module.to() makes new parameters: data put into old ones would lose what OnGpu holds.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    # Views of subclasses are not made in inference mode.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode))
    # The mode is of one thread, so tiles are read in it.
    monkeypatch.setattr(stream, "_ahead", lambda tiles: tiles)
    with _Mode():
        yield GPU
