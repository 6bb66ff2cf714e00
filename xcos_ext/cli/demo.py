"""``xcos demo``: the operators at work on generated feature maps, beside plain torch."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import XCosError

from . import options
from .console import note, print_json
from .inputs import chosen_device
from .verify import run as verify

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["run"]

_DEFAULT_OUT = "xcos_demo.png"
_PAIRS, _GALLERY, _TOP = 4096, 20_000, 5
_PROBES, _SHARE = 8, 256  # all pairs: what an attention network can do while one waits
_SHAPE = (32, 7, 7)
_SECONDS = 0.5  # of timing, for each of the two ways to do a job
# fp32 sums of 1,568 products in another order
_TOLERANCE = 2e-5
_THRESHOLD = 0.25


@click.command("demo")
@click.argument("pictures", nargs=-1, type=click.Path(), metavar="[A B]")
@options.model
@options.device
@click.option("--out", metavar="FILE", type=click.Path(), help="The picture to draw. [default: xcos_demo.png]")
@options.as_json
@click.pass_context
def run(
    ctx: click.Context, pictures: tuple[str, ...], model: str | None, device: str, out: str | None, as_json: bool
) -> int:
    """Pair scoring, gradients and a gallery search on generated feature maps, timed beside plain torch.

    With two photographs A B and a weights file it verifies them instead.
    """
    if len(pictures) not in (0, 2):
        raise click.UsageError(f"expected two pictures or none, got {len(pictures)}", ctx)
    from xcos_ext.explain import check_figure_path
    from xcos_ext.io.atomic import OutputError

    try:
        check_figure_path(out or _DEFAULT_OUT)
        target: str | None = out or _DEFAULT_OUT
    except OutputError as error:
        if out is not None or pictures:
            raise
        note(f"{error}; no picture is drawn (choose a place with --out)")
        target = None
    if pictures:
        a, b = pictures
        return int(ctx.invoke(verify, a=a, b=b, model=model, device=device, out=target, as_json=as_json))
    data = measure(chosen_device(device))
    if target is not None:
        _draw(target)
        data["picture"] = target
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


def measure(device: torch.device) -> dict[str, Any]:
    """Time the jobs both ways on a device and compare the results."""
    from xcos_ext.ops.templates import exact_convolutions

    with exact_convolutions(device):  # plain torch's too: what is compared must be as exact
        return _measured(device)


def _measured(device: torch.device) -> dict[str, Any]:
    import torch

    from xcos_ext import reference
    from xcos_ext.model import XCosAttention
    from xcos_ext.ops import build_info, xcos_matrix, xcos_score

    def search(score: Callable[..., Any]) -> Tensor:
        return score(probes, gallery, "norm")

    faces = generated_faces(_PAIRS, 2, seed=1).to(device)
    a, b = faces[:, 0].contiguous(), faces[:, 1].contiguous()
    leaf_a, leaf_b = a.clone().requires_grad_(), b.clone().requires_grad_()

    def gradients(score: Callable[..., Any], *how: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(score(leaf_a, leaf_b, *how).sum(), (leaf_a, leaf_b))

    gallery = generated_faces(_GALLERY, 1, seed=2)[:, 0].contiguous().to(device)
    planted = 12_345
    own = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(3)).to(device)
    probe = (gallery[planted] + 0.5 * gallery[planted].std() * own).unsqueeze(0)
    probes = probe.expand(_GALLERY, -1, -1, -1)

    jobs: list[dict[str, Any]] = []

    def job(name: str, ours: Callable[[], Any], plain: Callable[[], Any], difference: float) -> None:
        fast, slow = _timed((ours, plain), device)
        jobs.append(
            {
                "job": name,
                "xcos_ext": fast,
                "plain_torch": slow,
                "speedup": slow["median_ms"] / fast["median_ms"],
                "largest_difference": difference,
                "agree": difference <= _TOLERANCE,
            }
        )

    def apart(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
        """Largest difference, relative to the largest value."""
        return max(
            float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(ours, plain, strict=True)
        )

    job(
        f"score {_PAIRS:,} pairs",
        lambda: xcos_score(a, b),
        lambda: eager_score(a, b),
        apart([xcos_score(a, b)], [eager_score(a, b)]),
    )
    job(
        f"{_PAIRS:,} pairs with gradients",
        lambda: gradients(xcos_score),
        lambda: gradients(eager_score),
        apart(gradients(xcos_score), gradients(eager_score)),
    )
    scores = search(xcos_score)
    job(
        f"search {_GALLERY:,} faces",
        lambda: search(xcos_score).topk(_TOP),
        lambda: search(reference.xcos_score).topk(_TOP),
        apart([scores], [search(reference.xcos_score)]),
    )
    torch.manual_seed(4)
    untrained = XCosAttention(_SHAPE[0], symmetric=False)  # no less work
    attention = untrained.eval().requires_grad_(False).to(device)
    some, many = a[:_PROBES], gallery[:_SHARE]
    first, second = attention.templates(some, "probe"), attention.templates(many, "gallery")

    def every_pair() -> Tensor:
        x, y = some.repeat_interleave(_SHARE, 0), many.repeat(_PROBES, 1, 1, 1)
        return reference.xcos_score(x, y, attention(x, y)).view(_PROBES, _SHARE)  # type: ignore[union-attr]

    job(
        f"{_PROBES} x {_SHARE} pairs, learned attention",
        lambda: xcos_matrix(first, second),
        every_pair,
        apart([xcos_matrix(first, second)], [every_pair()]),
    )
    best = scores.topk(_TOP)
    return {
        "data": "generated feature maps",
        "shape": list(_SHAPE),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "instruction_set": build_info().get("isa"),
        "device": str(device),
        "jobs": jobs,
        "search": {
            "planted": planted,
            "found": int(best.indices[0]) == planted,
            "top": [{"face": int(i), "score": float(s)} for s, i in zip(best.values, best.indices, strict=True)],
        },
        "agree": all(entry["agree"] for entry in jobs) and int(best.indices[0]) == planted,
    }


def _draw(path: str) -> None:
    """A generated pair of the same identity, one picture of which has a region of somebody else's."""
    from xcos_ext.explain import save_figure, verification_figure
    from xcos_ext.ops import xcos_score

    maps = generated_faces(2, 2, seed=3)
    a, b = maps[0, :1].clone(), maps[0, 1:].clone()
    b[:, :, 4:6, 2:5] = maps[1, :1, :, 4:6, 2:5]
    result = xcos_score(a, b, "norm", return_maps=True)
    figure = verification_figure(
        None,
        None,
        result,
        _THRESHOLD,
        heading="generated feature maps",
        note="not faces: one generated identity, with six cells (rows 5 and 6, columns 3 to 5) of another",
    )
    save_figure(figure, path)


def _print(data: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"{data['threads']} threads, {data['instruction_set']}" if data["device"] == "cpu" else data["device"]
    click.echo(f"{data['data']}, {' x '.join(map(str, data['shape']))}, {data['dtype']}, {where}; medians")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for title in ("xcos_ext, ms", "plain torch, ms", "speed-up", "difference"):
        table.add_column(title, justify="right")
    for entry in data["jobs"]:
        table.add_row(
            entry["job"],
            f"{entry['xcos_ext']['median_ms']:.2f}",
            f"{entry['plain_torch']['median_ms']:.1f}",
            f"{entry['speedup']:.1f} x",
            f"{entry['largest_difference']:.0e}",
        )
    console = Console(width=88, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        console.print(table)
    click.echo(captured.get(), nl=False)
    search = data["search"]
    first = search["top"][0]
    others = ", ".join(f"{entry['score']:.3f}" for entry in search["top"][1:])
    click.echo(
        f"search: the planted face {search['planted']} is {'first' if search['found'] else 'NOT first'}: face "
        f"{first['face']} scores {first['score']:.3f}, the next {others}"
    )
    click.echo(f"results agree: {'yes' if data['agree'] else 'NO'}")
    if "picture" in data:
        click.echo(f"picture: {data['picture']}")
