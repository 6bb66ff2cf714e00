"""``xcos export tensorrt``: an engine for this GPU from an ONNX graph."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import XCosError

from .console import bar, notes_for_warnings, print_json

if TYPE_CHECKING:
    from xcos_ext.deploy.tensorrt import PlanCard

__all__ = ["Request", "run"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Request:
    """The command line's options; ``batch`` has texts like ``1:8:64``."""

    onnx: str
    out: str
    batch: tuple[str, ...] = ()
    tf32: bool = False
    device: str = "cuda"
    quiet: bool = False
    as_json: bool = False


def run(request: Request) -> int:
    """Build, write, and say what was built.

    Raises:
        XCosError: anything wrong with the graph, the options, the files, TensorRT or the GPU.
    """
    from xcos_ext.deploy.tensorrt import BatchProfile, build_engine

    begin = time.perf_counter()
    try:
        profiles = [BatchProfile.parse(text) for text in request.batch] or None
        with notes_for_warnings(), bar("building", "%", quiet=request.quiet) as tick:
            card = build_engine(
                request.onnx,
                request.out,
                profiles=profiles,
                tf32=request.tf32,
                device=request.device,
                progress=tick,
            )
    except ValueError as error:
        if isinstance(error, XCosError):
            raise
        raise XCosError(str(error).replace("profiles:", "--batch:").replace("device:", "--device:")) from error
    seconds = time.perf_counter() - begin
    if request.as_json:
        print_json({"plan": request.out, "seconds": seconds, **_summary(card)})
    elif not request.quiet:
        _show(request.out, seconds, card)
    return 0


def _summary(card: PlanCard) -> dict[str, Any]:
    """The sidecar's content, but for the graph's own notes, which may be long."""
    return {name: value for name, value in asdict(card).items() if name not in ("format", "metadata")}


def _show(plan: str, seconds: float, card: PlanCard) -> None:
    batches = ", ".join(str(p) if p.min == p.max else f"{p} (chosen for {p.opt})" for p in card.profiles)
    rows = [
        ("plan", f"{plan} ({card.plan_bytes / _MIB:.1f} MiB) and {plan}.json"),
        ("TensorRT", card.tensorrt),
        ("GPU", f"{card.gpu} (compute capability {card.sm})"),
        ("batch", batches or str(card.inputs[0].shape[0] if card.inputs[0].shape else 1)),
        *(("input", str(tensor)) for tensor in card.inputs),
        *(("output", str(tensor)) for tensor in card.outputs),
        *([("options", "tf32")] if card.tf32 else []),
        ("time", f"{seconds:.1f} s"),
    ]
    for name, value in rows:
        click.echo(f"{name:<10}{value}")
