"""``xcos export``: a model as an ONNX graph, and a graph as a TensorRT engine for this GPU."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import ModelError
from xcos_ext.io.text import display_name

from . import options
from .console import bar, note, notes_for_warnings, print_json, print_rows
from .inputs import check_model_path, is_graph, load

if TYPE_CHECKING:
    from xcos_ext.deploy.tensorrt import PlanCard

_MIB = 1 << 20


@options.command("onnx")
@options.model
@options.choice(
    "--kind",
    values=["pair", "template", "score"],
    default="pair",
    help="Two pictures to score and maps; a picture to its template; two templates to score and maps.",
)
@click.option("--out", required=True, metavar="FILE", type=options.Written(".onnx"), help="The graph to write: .onnx.")
@options.choice(
    "--dtype",
    values=["float32", "float16"],
    default="float32",
    help="Of the backbone inside; the head, inputs and outputs are float32.",
)
@options.number("--batch", most=options.MOST_AT_ONCE, help="A fixed batch; by default any.")
@click.option("--opset", type=options.Whole(1), metavar="N", help="Of the standard operators. [default: 18]")
@options.quiet
@options.as_json
def to_onnx(model: str | None, out: str, dtype: str, batch: int | None, quiet: bool, as_json: bool, **how: Any) -> int:
    """An ONNX graph of standard operators, with preprocessing, threshold and calibration in its metadata.

    xcos verify --model FILE.onnx then needs no torch.
    """
    from xcos_ext.io.optional import need

    path = check_model_path(model)
    if is_graph(path):
        raise ModelError(
            f"{display_name(path)}: it is an ONNX graph already; a recogniser's becomes a model by xcos plug"
        )
    for package in ("onnx", "onnxscript"):
        need(package, "exporting to ONNX", extra="onnx")
    import torch

    from xcos_ext.deploy import export_onnx

    card = export_onnx(
        load(path),
        out,
        dtype=getattr(torch, dtype),
        dynamic_batch=batch is None,
        batch_size=batch or 1,
        progress=None if quiet or as_json else note,
        **how,
    )
    size = os.path.getsize(out)
    if as_json:
        data = {"file": display_name(out), "bytes": size, "kind": card.kind, "name": card.name}
        data |= {"fingerprint": card.fingerprint, "threshold": card.threshold, "dtype": card.dtype}
        data |= {"opset": card.opset, "attention": card.attention, "preprocessing": asdict(card.preprocessing)}
        print_json(data | {"batch": batch, "templates": asdict(card.layout) | {"size": card.layout.size}})
        return 0
    if quiet:
        return 0
    print_rows(
        ("graph", f"{display_name(out)} ({size / 1e6:.2f} MB)"),
        ("kind", card.kind),
        ("model", f"{card.name} ({card.fingerprint})"),
        ("threshold", "unknown" if card.threshold is None else f"{card.threshold:.4f}"),
        ("inside", f"{card.dtype}, opset {card.opset}, batch {'any' if batch is None else batch}"),
    )
    return 0


@options.command("tensorrt")
@click.argument("onnx", type=click.Path(), metavar="GRAPH.onnx")
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=options.Written(".plan", ".engine"),
    help="The engine to write: .plan or .engine.",
)
@click.option(
    "--batch",
    "profiles",
    multiple=True,
    metavar="MIN:OPT:MAX",
    help="Batches that the engine runs, e.g. 1:8:64; may be repeated.",
)
@click.option("--tf32", is_flag=True, help="Allow TF32 where the graph says float32.")
@click.option("--device", default="cuda", metavar="cuda[:N]", help="The GPU to build for.")
@options.quiet
@options.as_json
def to_tensorrt(onnx: str, out: str, profiles: tuple[str, ...], quiet: bool, as_json: bool, **how: Any) -> int:
    """A TensorRT engine of a graph, for this GPU and this TensorRT; beside it a JSON file that says what it fits.

    Types are those of the graph: for half precision export it with --dtype float16.
    """
    from xcos_ext.deploy.tensorrt import BatchProfile, build_engine

    begin = time.perf_counter()
    batches = [BatchProfile.parse(text) for text in profiles] or None
    with notes_for_warnings(), bar("building", "%") as tick:
        card = build_engine(onnx, out, profiles=batches, progress=tick, **how)
    seconds = time.perf_counter() - begin
    if as_json:
        # The sidecar's content, but for the graph's own notes, which may be long.
        data = {name: value for name, value in asdict(card).items() if name not in ("format", "metadata")}
        print_json({"plan": out, "seconds": seconds, **data})
    elif not quiet:
        _show(out, seconds, card)
    return 0


def _show(plan: str, seconds: float, card: PlanCard) -> None:
    batches = ", ".join(str(p) if p.min == p.max else f"{p} (chosen for {p.opt})" for p in card.profiles)
    print_rows(
        ("plan", f"{plan} ({card.plan_bytes / _MIB:.1f} MiB) and {plan}.json"),
        ("TensorRT", card.tensorrt),
        ("GPU", f"{card.gpu} (compute capability {card.sm})"),
        ("batch", batches or str(card.inputs[0].shape[0] if card.inputs[0].shape else 1)),
        *(("input", str(tensor)) for tensor in card.inputs),
        *(("output", str(tensor)) for tensor in card.outputs),
        *([("options", "tf32")] if card.tf32 else []),
        ("time", f"{seconds:.1f} s"),
        width=9,
    )
