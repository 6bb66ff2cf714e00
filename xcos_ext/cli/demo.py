"""``xcos demo``: the operators at work on generated feature maps, beside plain torch."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xcos_ext.io.atomic import OutputError, check_output
from xcos_ext.io.errors import XCosError

from . import options
from .console import echo, note, print_json, print_tables, say_written, table
from .inputs import chosen_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["run"]

_PAIRS, _GALLERY, _TOP = 4096, 20_000, 5
_PROBES, _SHARE = 8, 256  # all pairs: what an attention network can do while one waits
_SHAPE = (32, 7, 7)
_SECONDS = 0.5  # of timing, for each of the two ways to do a job
# fp32 sums of 1,568 products in another order
_TOLERANCE = 2e-5
_THRESHOLD = 0.25
_DEFAULT_OUT = "xcos_demo.png"
_PLANTED = 12_345

#: Name, our way to do a job and plain torch's; both give the same tensors.
Job = tuple[str, Callable[[], "Sequence[Tensor]"], Callable[[], "Sequence[Tensor]"]]


@options.command("demo")
@options.device
@options.figure("--out", f"a generated pair, {_DEFAULT_OUT} by default")
@options.as_json
def run(device: str, out: str | None, as_json: bool) -> int:
    """Pair scoring, gradients and a gallery search on generated feature maps, timed beside plain torch."""
    if out is None:
        try:
            out = check_output(_DEFAULT_OUT, (".png",))
        except OutputError as error:
            note(f"{error}; no picture is drawn (choose a place with --out)")
    data = measure(chosen_device(device))
    if out is not None:
        _draw(out)
        data["picture"] = out
    if as_json:
        print_json(data)
    else:
        _print(data)
    if not data["agree"]:
        raise XCosError(
            "the compiled operators and plain torch disagree; please report this with the output of xcos info"
        )
    return 0


def generated_faces(people: int, pictures: int, seed: int) -> Tensor:
    """Feature maps of ``people`` generated identities, ``pictures`` of each: [people, pictures, 32, 7, 7] fp32.

    An identity is noise; its pictures are the identity plus weaker noise of their own. Cells near the middle
    are longer, as they are in maps of real faces.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    identity = torch.randn(people, 1, *_SHAPE, generator=generator)
    maps = identity + 0.8 * torch.randn(people, pictures, *_SHAPE, generator=generator)
    axis = torch.linspace(-1, 1, _SHAPE[1])
    length = torch.exp(-1.2 * (axis[:, None] ** 2 + axis[None, :] ** 2))
    return maps * length


def eager_score(a: Tensor, b: Tensor) -> Tensor:
    """The score as it is usually written: normalise, cosine_similarity, multiply, sum; [N, C, H, W] -> [N]."""
    import torch.nn.functional as functional

    similarity = functional.cosine_similarity(functional.normalize(a, dim=1), functional.normalize(b, dim=1), dim=1)
    weights = similarity.new_full(similarity.shape, 1 / similarity[0].numel())
    return (weights * similarity).sum((1, 2))


def measure(device: torch.device) -> dict[str, Any]:
    """Time the jobs both ways on a device and compare the results."""
    import torch

    from xcos_ext.ops import build_info
    from xcos_ext.ops.templates import exact_convolutions

    with exact_convolutions(device):  # plain torch's too: what is compared must be as exact
        jobs, best = _jobs(device)
        done = [_done(job, device) for job in jobs]
    top = [{"face": int(i), "score": float(s)} for s, i in zip(best.values, best.indices, strict=True)]
    found = top[0]["face"] == _PLANTED
    return {
        "data": "generated feature maps",
        "shape": list(_SHAPE),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "instruction_set": build_info().get("isa"),
        "device": str(device),
        "jobs": done,
        "search": {"planted": _PLANTED, "found": found, "top": top},
        "agree": found and all(entry["agree"] for entry in done),
    }


def _jobs(device: torch.device) -> tuple[list[Job], Any]:
    """What there is to do, and what the search finds."""
    import torch

    from xcos_ext import reference
    from xcos_ext.model import XCosAttention
    from xcos_ext.ops import xcos_matrix, xcos_score

    a, b = (faces.contiguous() for faces in generated_faces(_PAIRS, 2, seed=1).to(device).unbind(1))
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    gallery = generated_faces(_GALLERY, 1, seed=2)[:, 0].contiguous().to(device)
    own = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(3)).to(device)
    probes = (gallery[_PLANTED] + 0.5 * gallery[_PLANTED].std() * own).expand(_GALLERY, -1, -1, -1)
    torch.manual_seed(4)
    untrained = XCosAttention(_SHAPE[0], symmetric=False)  # no less work
    attention = untrained.eval().requires_grad_(False).to(device)
    some, many = a[:_PROBES], gallery[:_SHARE]
    templates = attention.templates(some, "probe"), attention.templates(many, "gallery")

    def gradients(score: Callable[..., Any]) -> Sequence[Tensor]:
        return torch.autograd.grad(score(*leaves).sum(), leaves)

    def search(score: Callable[..., Any]) -> Sequence[Tensor]:
        scores = score(probes, gallery, "norm")
        scores.topk(_TOP)
        return (scores,)

    def every_pair() -> Sequence[Tensor]:
        x, y = some.repeat_interleave(_SHARE, 0), many.repeat(_PROBES, 1, 1, 1)
        return (reference.xcos_score(x, y, attention(x, y)).view(_PROBES, _SHARE),)  # type: ignore[union-attr]

    jobs: list[Job] = [
        (f"score {_PAIRS:,} pairs", lambda: (xcos_score(a, b),), lambda: (eager_score(a, b),)),
        (f"{_PAIRS:,} pairs with gradients", lambda: gradients(xcos_score), lambda: gradients(eager_score)),
        (f"search {_GALLERY:,} faces", lambda: search(xcos_score), lambda: search(reference.xcos_score)),
        (f"{_PROBES} x {_SHARE} pairs, learned attention", lambda: (xcos_matrix(*templates),), every_pair),
    ]
    return jobs, xcos_score(probes, gallery, "norm").topk(_TOP)


def _done(job: Job, device: torch.device) -> dict[str, Any]:
    """How long a job takes both ways, and how far apart the results are, relative to the largest value."""
    name, ours, plain = job
    difference = max(
        float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(ours(), plain(), strict=True)
    )
    fast, slow = _timed((ours, plain), device)
    return {
        "job": name,
        "xcos_ext": fast,
        "plain_torch": slow,
        "speedup": slow["median_ms"] / fast["median_ms"],
        "largest_difference": difference,
        "agree": difference <= _TOLERANCE,
    }


def _timed(works: Sequence[Callable[[], Any]], device: torch.device) -> Iterator[dict[str, float]]:
    """Milliseconds of each, taken in turns: median, least and most of the calls."""
    import torch

    from xcos_ext.deploy.timing import Clock, Contender, measure_in_turns

    def finished(work: Callable[[], Any]) -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    contenders = [Contender(functools.partial(finished, work), Clock()) for work in works]
    for found in measure_in_turns(contenders, _SECONDS):
        if found.failure is not None:
            raise found.failure
        taken = [1e3 * seconds for values in found.rounds for seconds in values]
        yield {"median_ms": statistics.median(taken), "min_ms": min(taken), "max_ms": max(taken), "runs": len(taken)}


def _draw(path: str) -> None:
    """A generated pair of the same identity, one picture of which has a region of somebody else's."""
    from xcos_ext.explain import save_figure, verification_figure
    from xcos_ext.ops import xcos_score

    maps = generated_faces(2, 2, seed=3)
    a, b = maps[0, :1].clone(), maps[0, 1:].clone()
    b[:, :, 4:6, 2:5] = maps[1, :1, :, 4:6, 2:5]
    result = xcos_score(a, b, "norm", return_maps=True)
    note = "not faces: one generated identity, with six cells (rows 5 and 6, columns 3 to 5) of another"
    figure = verification_figure(None, None, result, _THRESHOLD, heading="generated feature maps", note=note)
    save_figure(figure, path)


def _print(data: dict[str, Any]) -> None:
    where = f"{data['threads']} threads, {data['instruction_set']}" if data["device"] == "cpu" else data["device"]
    echo(f"{data['data']}, {' x '.join(map(str, data['shape']))}, {data['dtype']}, {where}; medians")
    shown = table("", ["", "xcos_ext, ms", "plain torch, ms", "speed-up", "difference"])
    for entry in data["jobs"]:
        ours, plain = (entry[name]["median_ms"] for name in ("xcos_ext", "plain_torch"))
        difference = f"{entry['largest_difference']:.0e}"
        shown.add_row(entry["job"], f"{ours:.2f}", f"{plain:.1f}", f"{entry['speedup']:.1f} x", difference)
    print_tables(shown)
    search = data["search"]
    first, others = search["top"][0], ", ".join(f"{entry['score']:.3f}" for entry in search["top"][1:])
    echo(
        f"search: the planted face {search['planted']} is {'first' if search['found'] else 'NOT first'}: face "
        f"{first['face']} scores {first['score']:.3f}, the next {others}"
    )
    echo(f"results agree: {'yes' if data['agree'] else 'NO'}")
    say_written(("picture", data.get("picture")))
