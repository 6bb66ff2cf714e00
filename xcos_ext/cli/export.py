"""``xcos export onnx``: a model as a graph for other runtimes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import click

from .console import note, print_json
from .verify import check_model_path, is_graph, load

__all__ = ["OnnxRequest", "run_onnx"]


@dataclass(frozen=True, kw_only=True)
class OnnxRequest:
    """The command line's options."""

    model: str | None = None
    kind: str = "pair"
    out: str
    dtype: str = "float32"
    batch: int | None = None
    opset: int | None = None
    quiet: bool = False
    as_json: bool = False


def run_onnx(request: OnnxRequest) -> int:
    """Write the graph.

    Raises:
        XCosError: a model or an output that cannot be used.
    """
    from xcos_ext.faces import display_name
    from xcos_ext.io.atomic import check_output
    from xcos_ext.io.errors import ModelError, XCosError
    from xcos_ext.io.optional import need

    check_output(request.out, (".onnx",))
    path = check_model_path(request.model)
    if is_graph(path):
        raise ModelError(
            f"{display_name(path)}: it is an ONNX graph already; a recogniser's becomes a model by xcos plug"
        )
    for package in ("onnx", "onnxscript"):
        need(package, "exporting to ONNX", extra="onnx")
    import torch

    from xcos_ext.deploy import export_onnx

    model = load(path)
    try:
        card = export_onnx(
            model,
            request.out,
            kind=request.kind,  # type: ignore[arg-type]
            dtype=getattr(torch, request.dtype),
            dynamic_batch=request.batch is None,
            batch_size=request.batch or 1,
            opset=request.opset,
            progress=None if request.quiet or request.as_json else note,
        )
    except ValueError as error:
        raise error if isinstance(error, XCosError) else XCosError(str(error)) from error
    size = os.path.getsize(request.out)
    if request.as_json:
        data = {"file": display_name(request.out), "bytes": size, "kind": card.kind, "name": card.name}
        data |= {"fingerprint": card.fingerprint, "threshold": card.threshold, "dtype": card.dtype}
        data |= {"opset": card.opset, "attention": card.attention, "preprocessing": asdict(card.preprocessing)}
        print_json(data | {"batch": request.batch, "templates": asdict(card.layout) | {"size": card.layout.size}})
        return 0
    batch = "any" if request.batch is None else request.batch
    for name, value in (
        ("graph", f"{display_name(request.out)} ({size / 1e6:.2f} MB)"),
        ("kind", card.kind),
        ("model", f"{card.name} ({card.fingerprint})"),
        ("threshold", "unknown" if card.threshold is None else f"{card.threshold:.4f}"),
        ("inside", f"{card.dtype}, opset {card.opset}, batch {batch}"),
    ):
        click.echo(f"{name:<10} {value}")
    return 0
