"""Recognisers from networks of other packages, split at a named layer."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from xcos_ext.card.preprocessing import ARCFACE, Preprocessing
from xcos_ext.io.errors import ModelError
from xcos_ext.io.text import first_line

from .feature_map import FeatureMap, is_map_shape, shown, with_choice
from .followed import BATCH_NORMS, Followed, follow
from .modes import kept_modes
from .recogniser import Recogniser

__all__ = ["LayerRecogniser", "from_layer", "layer_feature_maps"]

# --- running up to a layer


class _Reached(BaseException):
    """Ends a forward at a layer; not an Exception, so that a network's own handlers let it pass."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _up_to(module: nn.Module, layer: nn.Module, images: Tensor) -> Any:
    """What a layer gives when the network is called; nothing behind it is run.

    Raises:
        ModelError: the layer is not called.
    """
    caller = threading.get_ident()

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == caller:  # another thread may use the same network
            raise _Reached(output)

    handle = layer.register_forward_hook(stop)
    try:
        module(images)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise ModelError("layer: the network does not call it")


class _UpTo(nn.Module):
    """The body of a network that cannot be followed."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network = network
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = _up_to(self.network, self.network.get_submodule(self.layer), images)
        return made


class _Called(nn.Module):
    """A function as module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, grid: Tensor) -> Tensor:
        try:
            return self.function(grid)
        except RuntimeError as error:
            if grid.dtype != torch.float64:
                raise
            # The closed form computes in fp64, and the weights of a function cannot be seen.
            raise ModelError(
                f"output: a function that does not work in fp64; give a module instead ({error})"
            ) from error


# --- the recogniser


class LayerRecogniser(Recogniser):
    """A network of another package, split at a named layer; made by :func:`from_layer`.

    Attributes:
        layer: name of the layer whose output is the map.
        body: images to the map; shares its parameters with the network.
        output: the map to the embedding, or None.
        reason: why there is no output block, or None.
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("output.",)

    def __init__(
        self,
        layer: str,
        body: nn.Module,
        output: nn.Module | None,
        *,
        grid_shape: tuple[int, int, int],
        embedding_size: int | None,
        preprocessing: Preprocessing = ARCFACE,
        reason: str | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.body = body
        self.output = output
        self.grid_shape = grid_shape
        self.embedding_size = embedding_size
        self.preprocessing = preprocessing
        self.reason = reason
        self.traceable = isinstance(body, fx.GraphModule)

    def grid(self, images: Tensor) -> Tensor:
        """Images [N, 3, height, width], normalised -> what the layer gives [N, *grid_shape]."""
        return self.body(images)

    def embed(self, grid: Tensor) -> Tensor:
        """Feature map [N, *grid_shape] -> embedding [N, embedding_size].

        Raises:
            RuntimeError: there is no output block; the message says why.
        """
        if self.output is None:
            raise RuntimeError(f"{self.architecture}: no output block behind layer {self.layer!r}: {self.reason}")
        return self.output(grid).flatten(1)

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, grid_shape={self.grid_shape}, embedding_size={self.embedding_size}"


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; every submodule's own mode afterwards."""
    with kept_modes(module), torch.no_grad():
        module.eval()
        yield


def _apart(block: nn.Module, body: nn.Module) -> nn.Module:
    """The block in modules of its own where it shares some with the body; the parameters stay shared.

    ``torch.func.functional_call`` would exchange the weights of one module at two places twice, and put them back once.
    """
    if not {id(part) for part in block.modules()} & {id(part) for part in body.modules()}:
        return block
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, kept)


def _blank(module: nn.Module, size: tuple[int, int]) -> Tensor:
    parameter = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(2, 3, *size, device=parameter.device, dtype=parameter.dtype)


def _run(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ModelError:
        raise
    except Exception as error:  # the network's own
        raise ModelError(f"{what}: it fails for a picture ({first_line(error)})") from error


def from_layer(
    module: nn.Module,
    layer: str | None = None,
    *,
    input_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing = ARCFACE,
    output: nn.Module | Callable[[Tensor], Tensor] | None = None,
) -> LayerRecogniser:
    """Make a recogniser of any network by splitting it at the output of one of its layers.

    The network is followed with torch.fx in evaluation mode. What leads to the layer becomes the body, what leads from
    it to the embedding the output block; both share their parameters with the network, and gradients flow. A network
    that cannot be followed (its forward decides by values) still gives the map: it is run up to the layer and stopped
    there. It then has an embedding only if ``output`` is given, cannot be exported, and its batch norms are not folded.

    Args:
        module: maps images [N, 3, height, width] to embeddings [N, D]; put into evaluation mode.
        layer: name of a submodule as in ``module.named_modules()``, e.g. ``"layer4"``, called once, with a map
            [N, C, H, W] as output; None: the one nearest to the output that the output depends on alone, in front of
            batch norm (:func:`~xcos_ext.backbones.feature_maps` lists them).
        input_size: (height, width) of the images; None: ``preprocessing.size``.
        preprocessing: pixel normalisation of the network's input.
        output: the output block, from the map to the embedding, in place of the network's own.

    Returns:
        The recogniser, in evaluation mode.

    Raises:
        TypeError: not a module, or ``output`` that cannot be called.
        ModelError: no such layer, one that is never called or called more often than once, another output than a map,
            a network that fails for a picture, or no usable map.

    >>> net = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(294, 8))
    >>> recogniser = from_layer(net, "1")
    >>> recogniser.grid_shape, recogniser.embedding_size, recogniser(torch.zeros(2, 3, 112, 112)).shape
    ((6, 7, 7), 8, torch.Size([2, 8]))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch module, got {type(module).__name__}")
    if output is not None and not callable(output):
        raise TypeError(f"output: expected a module or a function, got {type(output).__name__}")
    if input_size is not None:
        preprocessing = Preprocessing((input_size[0], input_size[1]), preprocessing.mean, preprocessing.std)
    name = type(module).__name__
    module.eval()
    with torch.no_grad():
        images = _blank(module, preprocessing.size)
        if layer is None:
            maps = layer_feature_maps(module, images)
            layer = next((m.name for m in maps if m.chosen), None)
            if layer is None:
                raise ModelError(
                    f"{name}: no usable feature map: none of 4x4 to 16x16 cells that the output depends on"
                )
        parts = dict(module.named_modules())
        if layer not in parts or not layer:
            raise ModelError(
                f"{name}: layer: there is no submodule {layer!r}; usable maps: "
                f"{shown(layer_feature_maps(module, images))}"
            )
        followed = follow(module)
        grid = _run(name, lambda: _up_to(module, parts[layer], images))
        if not isinstance(grid, Tensor) or grid.dim() != 4 or len(grid) != len(images):
            got = list(grid.shape) if isinstance(grid, Tensor) else type(grid).__name__
            raise ModelError(f"{name}: layer: expected a map [N, C, H, W], {layer!r} gives {got}")
        body, own, reason = _split(module, layer, followed)
        block = own if output is None else output if isinstance(output, nn.Module) else _Called(output)
        embedding_size = None
        if block is not None:
            block = _apart(block, body).eval()
            made = _run(f"{name}: output", lambda: block(grid))
            if (
                not isinstance(made, Tensor)
                or made.dim() < 2
                or len(made) != len(images)
                or made[0].squeeze().dim() > 1
            ):
                got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ModelError(f"{name}: output: expected an embedding [N, D], got {got}")
            embedding_size = made[0].numel()
    return LayerRecogniser(
        layer,
        body,
        block,
        grid_shape=(grid.shape[1], grid.shape[2], grid.shape[3]),
        embedding_size=embedding_size,
        preprocessing=preprocessing,
        reason=None if block is not None else reason,
    ).eval()


def _split(module: nn.Module, layer: str, followed: Followed | None) -> tuple[nn.Module, nn.Module | None, str | None]:
    """Body, the network's own output block or None, and why there is none.

    Raises:
        ModelError: the layer is called more often than once.
    """
    if followed is not None and layer in followed.used_often:
        raise ModelError(f"{type(module).__name__}: layer: {layer!r} is called more often than once")
    if followed is None or layer not in followed.given:
        return _UpTo(module, layer), None, "torch.fx cannot follow the network; give one as output="
    cut = followed.given[layer]
    body, block = followed.halves(cut)
    return body, block, followed.bypass(cut)


def layer_feature_maps(module: nn.Module, example: Tensor | None = None) -> list[FeatureMap]:
    """:func:`~xcos_ext.backbones.feature_maps` of a module: those of its submodules that were called."""
    calls: list[tuple[str, Any]] = []
    handles = [
        part.register_forward_hook(lambda _m, _a, made, path=path: calls.append((path, made)))
        for path, part in module.named_modules()
        if path
    ]
    with _evaluating(module):
        try:
            images = _blank(module, ARCFACE.size) if example is None else example
            _run(type(module).__name__, lambda: module(images))
        finally:
            for handle in handles:
                handle.remove()
        followed = follow(module)
    parts = dict(module.named_modules())
    maps: list[FeatureMap] = []
    seen_nodes: set[fx.Node] = set()
    for place in reversed(range(len(calls))):
        path, made = calls[place]
        shape = tuple(made.shape) if isinstance(made, Tensor) else None
        if not is_map_shape(shape) or sum(p == path for p, _ in calls) > 1:
            continue
        assert shape is not None
        distance = sum(not any(parts[p].children()) for p, _ in calls[place + 1 :])
        affine: bool | None = None
        if followed is not None and path in followed.given:
            node = followed.given[path]
            if followed.bypass(node) is not None or node in seen_nodes:
                continue  # a container and its last layer give the same map: the container's name is the better one
            seen_nodes.add(node)
            affine = followed.affine(node)
        maps.append(FeatureMap(path, (shape[1], shape[2], shape[3]), type(parts[path]).__name__, distance, affine))

    def passed(one: FeatureMap, before: FeatureMap) -> bool:
        return isinstance(parts[one.name], BATCH_NORMS) and one.shape == before.shape

    return with_choice(maps, passed)
