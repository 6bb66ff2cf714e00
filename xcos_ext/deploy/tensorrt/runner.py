"""Running a plan on torch's tensors and streams."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xcos_ext.io.atomic import StrPath

from . import gpu as gpus
from .engine import Context, Engine, torch_dtype
from .package import TensorRTError, load_tensorrt, log_of
from .plan import load_plan

__all__ = ["TrtRunner"]


@dataclass(frozen=True)
class _Graph:
    """A captured launch: where it reads and writes, how to start it, and the context it holds on to."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    replay: Callable[[], None]
    context: Context

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inputs.values()
        yield from self.outputs.values()


class TrtRunner:
    """A TensorRT engine that takes and gives torch tensors.

    Work goes to torch's current stream. No call waits for the GPU, except the first of a batch size. (TensorRT would
    synchronise on the default stream; such launches go through a stream of the runner's own, ordered by events.)
    Calls from several threads or streams follow one another: they share one scratch memory.

    With ``graph=True`` every batch size has a CUDA graph with tensors of its own. A call copies the inputs into them,
    unless they are those very tensors (:meth:`static_inputs`), and returns the graph's outputs: **the next call of the
    same batch size overwrites them**, so clone what has to stay. With ``graph=False`` inputs are read in place and
    outputs are new.

    :meth:`run` can be captured into a larger graph, after one call of that batch size outside. The runner has to
    outlive such a graph, and must not run while it does.

    A plan is code. It is loaded only if its hash is the one in its sidecar, which finds damage but not malice: run
    plans that you built or whose origin you trust.

    Args:
        plan: from :func:`~xcos_ext.deploy.tensorrt.build_engine`, with its sidecar beside it.
        device: the GPU.
        graph: replay CUDA graphs.
        max_graphs: batch sizes to keep graphs of; the longest unused is given up.

    Attributes:
        card: the sidecar's content (:class:`~xcos_ext.deploy.tensorrt.PlanCard`).

    Raises:
        EngineError: the plan is missing, cut off, changed, without its sidecar, or for another TensorRT or GPU.
        MissingPackageError: tensorrt is not installed.
        TensorRTError: no GPU, or a TensorRT that cannot start.
        ValueError: not a CUDA device, or max_graphs below 1.
    """

    def __init__(
        self, plan: StrPath, *, device: str | torch.device = "cuda", graph: bool = True, max_graphs: int = 16
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs: expected at least 1, got {max_graphs}")
        self.card, data = load_plan(plan)
        trt = load_tensorrt()
        self.card.check_version(trt.__version__, plan)
        self._gpu = gpus.CUDA.find(device)
        self.card.check_gpu(self._gpu.sm, self._gpu.name, plan)
        if self._gpu.name != self.card.gpu:
            warnings.warn(
                f"{plan}: its kernels were chosen on {self.card.gpu}, this is {self._gpu.name}: built here it may be "
                "faster",
                UserWarning,
                stacklevel=2,
            )
        with gpus.CUDA.using(self._gpu):
            self._engine = Engine(trt, log_of(trt), self._gpu, plan, data, self.card)
            self._own_stream = gpus.CUDA.new_stream(self._gpu)
        self._graph = graph
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[int, _Graph] = OrderedDict()
        self._contexts: dict[int, Context] = {}
        self._captured: set[Context] = set()
        self._last_stream: Any = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        names = " -> ".join(", ".join(side) for side in (self._engine.inputs, self._engine.outputs))
        return f"TrtRunner({names}, batch {self._batches()}, TensorRT {self.card.tensorrt}, {self.card.gpu})"

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the engine.

        Args:
            inputs: all of the engine's, by name: contiguous tensors on its GPU with the shapes and dtypes of
                ``card.inputs``, the same batch in each. Without graphs their memory starts at a multiple of 256 bytes.

        Returns:
            Output name -> tensor. With ``graph=True`` the graph's own, valid until the next call of this batch size.

        Raises:
            ValueError: an input that is missing, unknown, of another shape, dtype or device, not contiguous, or of a
                batch outside the plan's profiles; the message names it.
            TypeError: an input that is not a tensor.
            TensorRTError: TensorRT reports an error.
        """
        batch, profile = self._checked(inputs)
        with self._lock, gpus.CUDA.using(self._gpu), torch.no_grad():
            stream = gpus.CUDA.current_stream(self._gpu)
            if gpus.CUDA.capturing():
                context = self._ready(profile, batch)
                self._captured.add(context)  # somebody's graph reads its memory: keep it
                return self._launched(context, inputs, stream)
            self._follow(stream)
            if not self._graph:
                return self._directly(self._context(profile, stream), batch, inputs, stream)
            graph = self._graph_of(profile, batch, stream)
            for name, mine in graph.inputs.items():
                if inputs[name].data_ptr() != mine.data_ptr():
                    mine.copy_(inputs[name])
            graph.replay()
            return dict(graph.outputs)

    def static_inputs(self, batch: int) -> dict[str, Tensor]:
        """The tensors that a batch size's graph reads: fill them and give them to :meth:`run`, and nothing is copied.

        Captures the graph if there is none yet. They stay valid while the runner keeps the graph (``max_graphs``).

        Raises:
            ValueError: a batch outside the plan's profiles, or a runner without graphs.
            TensorRTError: the engine cannot be captured.
        """
        if not self._graph:
            raise ValueError(
                "static_inputs: expected a runner with graph=True; without graphs inputs are read in place"
            )
        profile = self._profile("batch", batch)
        with self._lock, gpus.CUDA.using(self._gpu), torch.no_grad():
            if gpus.CUDA.capturing():
                raise TensorRTError("static_inputs: expected a stream that is not being captured")
            stream = gpus.CUDA.current_stream(self._gpu)
            self._follow(stream)
            return dict(self._graph_of(profile, batch, stream).inputs)

    # Checks

    def _checked(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """The batch size and the profile for it, once everything is as the engine needs it."""
        cards = self._engine.inputs
        if inputs.keys() != cards.keys():
            got = ", ".join(map(str, inputs)) or "none"
            raise ValueError(f"inputs: expected {', '.join(cards)}, got {got}")
        batch, first = self._fixed_batch(), ""
        for name, card in cards.items():
            value = inputs[name]
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch tensor, got {type(value).__name__}")
            if value.device != self._gpu.device:
                raise ValueError(f"{name}: expected a tensor on {self._gpu.device}, got one on {value.device}")
            if value.dtype != torch_dtype(card):
                raise ValueError(f"{name}: expected {card.dtype}, got {str(value.dtype).removeprefix('torch.')}")
            shape = tuple(value.shape)
            if len(shape) != len(card.shape) or shape != card.shape_for(shape[0] if shape else 0):
                wanted = ", ".join("batch" if n == -1 else str(n) for n in card.shape)
                raise ValueError(f"{name}: expected the shape [{wanted}], got {list(shape)}")
            if not value.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(value.stride())}")
            if card.shape[:1] != (-1,):
                continue
            if first and shape[0] != batch:
                raise ValueError(f"{name}: expected a batch of {batch}, as {first} has, got {shape[0]}")
            batch, first = shape[0], first or name
        return batch, self._profile(first, batch)

    def _profile(self, name: str, batch: int) -> int:
        profile = self._engine.profile_of(batch)
        if profile is not None:
            return profile
        if not self._engine.profiles and batch == self._fixed_batch():
            return 0
        raise ValueError(f"{name}: expected a batch of {self._batches()} (the plan's profile), got {batch}")

    def _fixed_batch(self) -> int:
        return next((card.shape[0] for card in self._engine.inputs.values() if card.shape), 1)

    def _batches(self) -> str:
        return " or ".join(map(str, self._engine.profiles)) or str(self._fixed_batch())

    # Launches

    def _follow(self, stream: Any) -> None:
        """Make a stream wait for the runner's work on the one before."""
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
            gpus.CUDA.keep(self._engine.scratch, stream)
            for graph in self._graphs.values():
                for tensor in graph.tensors():
                    gpus.CUDA.keep(tensor, stream)
        self._last_stream = stream

    def _context(self, profile: int, stream: Any) -> Context:
        """The context for launches without a graph."""
        context = self._contexts.get(profile)
        if context is None:
            context = self._contexts[profile] = self._new_context(profile, stream)
        return context

    def _new_context(self, profile: int, stream: Any) -> Context:
        self._own_stream.wait_stream(stream)
        context = self._engine.context(profile, self._own_stream.cuda_stream)
        stream.wait_stream(self._own_stream)
        return context

    def _ready(self, profile: int, batch: int) -> Context:
        """A context that can be captured: what TensorRT sets up at first use has happened."""
        context = self._graphs[batch].context if batch in self._graphs else self._contexts.get(profile)
        if context is None or context.batch != batch:
            raise TensorRTError(f"run a batch of {batch} once before capturing it: TensorRT still has to set up")
        return context

    def _outputs(self, context: Context) -> dict[str, Tensor]:
        return {
            name: torch.empty(context.output_shapes[name], dtype=torch_dtype(card), device=self._gpu.device)
            for name, card in self._engine.outputs.items()
        }

    def _launched(self, context: Context, inputs: Mapping[str, Tensor], stream: Any) -> dict[str, Tensor]:
        outputs = self._outputs(context)
        context.launch(_addresses({**inputs, **outputs}), stream.cuda_stream)
        return outputs

    def _directly(self, context: Context, batch: int, inputs: Mapping[str, Tensor], stream: Any) -> dict[str, Tensor]:
        context.set_batch(batch)
        if stream.cuda_stream != 0:
            return self._launched(context, inputs, stream)
        self._own_stream.wait_stream(stream)
        try:
            return self._launched(context, inputs, self._own_stream)
        finally:
            stream.wait_stream(self._own_stream)

    def _graph_of(self, profile: int, batch: int, stream: Any) -> _Graph:
        graph = self._graphs.get(batch)
        if graph is not None:
            self._graphs.move_to_end(batch)
            return graph
        # A context of its own: TensorRT may keep in it what the graph reads again.
        context = self._new_context(profile, stream)
        context.set_batch(batch)
        inputs = {
            name: torch.zeros(card.shape_for(batch), dtype=torch_dtype(card), device=self._gpu.device)
            for name, card in self._engine.inputs.items()
        }
        outputs = self._outputs(context)
        addresses = _addresses({**inputs, **outputs})
        replay = gpus.CUDA.record(self._gpu, lambda handle: context.launch(addresses, handle))
        if len(self._graphs) >= self._max_graphs:
            stream.synchronize()  # the last work of any graph is on this stream, or before it
            self._graphs.popitem(last=False)
        graph = self._graphs[batch] = _Graph(inputs, outputs, replay, context)
        return graph


def _addresses(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    unit = gpus.CUDA.alignment
    for name, address in addresses.items():
        if address % unit:
            raise ValueError(
                f"{name}: expected memory that starts at a multiple of {unit} bytes, got a view that starts "
                f"{address % unit} bytes behind one; clone it"
            )
    return addresses
