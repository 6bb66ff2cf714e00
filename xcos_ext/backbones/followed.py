"""Networks followed with torch.fx: what leads where, and where they can be cut in two."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from xcos_ext.io.errors import ModelError

from .plain import altered

__all__ = ["BATCH_NORMS", "Followed", "follow", "graph_of"]

#: Modules that a map is taken from in front of: as in the networks of the package, they belong to the output block.
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity)
_AFFINE_MODULES = (nn.Conv2d, nn.Linear, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d, *BATCH_NORMS)
_AFFINE_FUNCTIONS = (
    torch.flatten,
    torch.squeeze,
    torch.mean,
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.dropout,
    operator.add,
    operator.getitem,
    operator.sub,
    getattr,
)
_AFFINE_METHODS = ("flatten", "view", "reshape", "mean", "squeeze", "size", "contiguous", "permute", "dim")


_TRACING = threading.RLock()


class _OneThread(fx.Tracer):
    """Follows what its own thread calls, and nothing else.

    While torch.fx traces, ``nn.Module`` itself is patched, for every thread: another one that runs a model then would
    be traced, too, and two that trace could leave the patch behind for good.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As fx does it, one at a time."""
        with _TRACING:
            self._owner = threading.get_ident()
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if isinstance(node.type, str):  # of postponed annotations; a graph with them cannot be pickled
                node.type = None
        return graph

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Others' modules are called."""
        if threading.get_ident() != self._owner:
            return forward(*args, **kwargs)
        return self.follow_module(m, forward, args, kwargs)

    def follow_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What is done with a module of this thread."""
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Others get what they asked for."""
        if threading.get_ident() != self._owner:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def graph_of(module: nn.Module) -> fx.GraphModule:
    """``torch.fx.symbolic_trace`` for programs with several threads; the result can be pickled."""
    return fx.GraphModule(module, _OneThread().trace(module), type(module).__name__)


class _Tracer(_OneThread):
    """Follows a network, keeps whole what cannot be followed, and remembers what every submodule gave."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, list[Any]] = {}

    def follow_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As fx does it, but a submodule whose forward cannot be followed becomes one node."""
        path = self.path_of_module(m)
        known, stack = set(self.graph.nodes), self.module_stack.copy()
        try:
            made = super().follow_module(m, forward, args, kwargs)
        except Exception:  # whatever a network does with a value that is not there
            for node in reversed([n for n in self.graph.nodes if n not in known]):
                self.graph.erase_node(node)
            self.module_stack = stack
            for inner in [name for name in self.given if name.startswith(f"{path}.")]:
                del self.given[inner]
            made = self.create_proxy("call_module", path, args, kwargs)
        self.given.setdefault(path, []).append(made)
        return made


class Followed:
    """A network as a graph of torch.fx.

    Raises:
        Exception: of any kind, where the network's own forward cannot be followed.
    """

    def __init__(self, module: nn.Module) -> None:
        from xcos_ext.onnx.flow import Flow  # loads networkx

        self.module = module
        tracer = _Tracer()
        self.graph = tracer.trace(module)
        self.nodes = list(self.graph.nodes)
        inputs = [n for n in self.nodes if n.op == "placeholder" and not n.args]
        if len(inputs) != 1:
            raise ModelError(f"module: expected a network of one input, the images, got {len(inputs)}")
        self.input = inputs[0]
        result = next(n for n in self.nodes if n.op == "output").args[0]
        self.output = result if isinstance(result, fx.Node) else None
        self.given = {
            path: made[0].node for path, made in tracer.given.items() if len(made) == 1 and hasattr(made[0], "node")
        }
        self.used_often = {path for path, made in tracer.given.items() if len(made) > 1}
        self._flow = Flow(self.nodes, ((given, node) for node in self.nodes for given in node.all_input_nodes))
        self._needed = set() if self.output is None else self._flow.behind([self.output])

    def depending(self, start: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
        """The nodes that depend on ``start``, not through ``without``; among those that the output is made of."""
        return self._flow.depending([start], self._needed - {without})

    def bypass(self, cut: fx.Node) -> str | None:
        """Where the output depends on the images other than through a node, in words; None where it does not."""
        if self.output is None:
            return "the network gives more than one tensor"
        if cut not in self._needed:
            return "the output does not depend on it"
        around = self.depending(self.input, cut)
        if self.output not in around:
            return None
        through = self.depending(cut)
        joins = [n for n in self.nodes if n in around and n in through and any(i in around for i in n.all_input_nodes)]
        return f"{joins[0] if joins else self.output} joins in what leads around it"

    def halves(self, cut: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule | None]:
        """Images to the node, and the node to the output; both share the network's parameters."""
        return self._part([self.input], cut), (
            None if self.bypass(cut) is not None or self.output is None else self._part([cut], self.output)
        )

    def _part(self, starts: Sequence[fx.Node], end: fx.Node) -> fx.GraphModule:
        wanted = self._flow.behind([end], starts)
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node in starts:
                copies[node] = made.placeholder("images" if node.op == "placeholder" else "grid")
            elif node in wanted and node.op == "placeholder":  # an option of the forward, at its default
                copies[node] = node.args[0]  # type: ignore[assignment]
            elif node in wanted:
                copies[node] = made.node_copy(node, lambda n: copies[n])
        made.output(copies[end])
        return fx.GraphModule(self.module, made, type(self.module).__name__)

    def affine(self, cut: fx.Node) -> bool:
        """Whether nothing behind a node but affine modules and reshaping leads to the output."""
        modules = dict(self.module.named_modules())
        for node in self.depending(cut) - {cut}:
            if node.op == "call_module" and not isinstance(modules[str(node.target)], _AFFINE_MODULES):
                return False
            if node.op == "call_function" and node.target not in _AFFINE_FUNCTIONS:
                return False
            if node.op == "call_method" and node.target not in _AFFINE_METHODS:
                return False
        return True


def follow(module: nn.Module) -> Followed | None:
    """The network as a graph; None where it cannot be followed, or does more when it is called than its class says:
    torch.fx follows the class's forward, and would leave hooks of the network itself out."""
    if altered(module):
        return None
    try:
        return Followed(module)
    except ModelError:
        raise
    except Exception:  # a network may raise anything when it is asked about values that are not there
        return None
