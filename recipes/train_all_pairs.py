"""Train an xCos head with a loss over all pairs of every batch, on the frozen maps of a recogniser.

    python -m recipes.train_all_pairs faces.zip --model net.pt --loss infonce --out head.safetensors

Faces are aligned crops ``<person>/<picture>`` in a folder or zip archive, the network is whatever
``xcos_ext.model.load_recogniser`` reads. The network is run once per face; from then on only the head is computed: its
1x1 block and its attention, whose weights differ from pair to pair. A batch of B faces has B * B of them, and
``xcos_matrix`` scores them all without keeping any: its backward pass computes the pairs again. Figures are in
docs/training.md.

People are held out before anything is computed; verification before and after training is measured on all pairs among
them. Nothing is written without ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from recipes.closed_forms import iterate_pictures
from xcos_ext import reference
from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation import VerificationReport, fmr_threshold, verification
from xcos_ext.faces import PersonFolder
from xcos_ext.model import XCosAttention, XCosHead, XCosModel, load_recogniser, save_model
from xcos_ext.ops import xcos_matrix
from xcos_ext.training.losses import all_pairs, kinds, make_loss, teacher_loss
from xcos_ext.training.sampling import IdentityBatches
from xcos_ext.training.tasks.sources import fix_statistics

Loss = Callable[[Tensor, Tensor], Tensor]

FOLDS = 5  # of held-out people, for the accuracy
FMRS = (1e-1, 1e-2, 1e-3)
DECISION_FMR = 5e-3  # of the threshold that a saved model gets, as in xcos_ext.evaluation.calibrate


# --- faces


class Faces(NamedTuple):
    """Maps of faces: grids fp16 [N, C, H, W], embeddings fp32 [N, D] at unit length (None: no output block), and
    people int64 [N], numbered from 0."""

    grids: Tensor
    embeddings: Tensor | None
    people: Tensor


def choose(pictures: PersonFolder, faces: int, per_person: int, at_least: int, seed: int) -> list[tuple[str, ...]]:
    """Keys of at most ``per_person`` pictures of each person with ``at_least`` or more, ``faces`` or fewer in all.

    Raises:
        ValueError: nobody has so many pictures, or the limits leave nobody.
    """
    if not at_least <= per_person <= faces:
        raise ValueError(
            f"--faces, --per-person: expected room for {at_least} pictures of a person, got {faces} and {per_person}"
        )
    random = np.random.default_rng(seed)
    people = [person for person in pictures.people if len(pictures.of(person)) >= at_least]
    if not people:
        raise ValueError(
            f"{pictures.path}: expected people with {at_least} pictures or more, got none among {len(pictures.people)}"
        )
    chosen: list[tuple[str, ...]] = []
    total = 0
    for person in random.permutation(people):
        keys = random.permutation(pictures.of(str(person)))[:per_person]
        total += len(keys)
        if total > faces:
            break
        chosen.append(tuple(map(str, keys)))
    return chosen


def hold_out(chosen: Sequence[tuple[str, ...]], share: float) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Pictures to train on and pictures held out; no person is in both.

    Raises:
        ValueError: fewer than two people held out for each fold of the accuracy.
    """
    count = round(share * len(chosen))
    if count < 2 * FOLDS:
        raise ValueError(
            f"--held-out: expected at least {2 * FOLDS} people with several pictures, got {count} of {len(chosen)}"
        )
    return list(chosen[count:]), list(chosen[:count])


def whose(chosen: Sequence[Sequence[str]]) -> Tensor:
    """Whose face each picture is: int64 [N], from 0."""
    return torch.repeat_interleave(torch.tensor([len(group) for group in chosen], dtype=torch.int64))


@torch.no_grad()
def compute(recogniser: Recogniser, pictures: PersonFolder, chosen: Sequence[Sequence[str]]) -> Faces:
    """The network's maps and embeddings of all chosen pictures, computed once and kept in memory as fp16."""
    keys = [key for group in chosen for key in group]
    grids = torch.empty(len(keys), *recogniser.grid_shape, dtype=torch.float16)
    embeddings = []
    done = 0
    for batch in iterate_pictures(pictures, keys):
        grid = recogniser.grid(recogniser.preprocessing(batch))
        grids[done : done + len(grid)] = grid
        if recogniser.embedding_size is not None:
            embeddings.append(F.normalize(recogniser.embed(grid)))
        done += len(grid)
    return Faces(grids, torch.cat(embeddings) if embeddings else None, whose(chosen))


class Batches:
    """P people with K different pictures each, drawn at random.

    Args:
        people: int64 [N], whose face each is.
        count: P.
        pictures: K.
        seed: of the draws.

    Raises:
        ValueError: fewer than P people have K pictures, or P or K is below 2.
    """

    def __init__(self, people: Tensor, count: int, pictures: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.batches = IdentityBatches(people, torch.arange(len(people)), count, pictures)

    def draw(self) -> Tensor:
        """Indices of faces [P * K], a person's own side by side."""
        return self.batches.draw(self.random)


# --- the head


@torch.no_grad()
def evaluate(head: XCosHead, faces: Faces, seed: int) -> tuple[VerificationReport, np.ndarray]:
    """Verification on every pair of different faces, each once, and the impostors' scores."""
    features = torch.cat([head.features(part.float()) for part in faces.grids.split(256)])
    return _report(all_pairs(head, features), faces.people, seed)


def _report(scores: Tensor, people: Tensor, seed: int) -> tuple[VerificationReport, np.ndarray]:
    """Rates over all pairs; accuracy over equally many pairs of both kinds in folds that share no person."""
    rows, columns = torch.triu_indices(len(people), len(people), 1)
    values, genuine = scores[rows, columns].numpy(), (people[rows] == people[columns]).numpy()
    random = np.random.default_rng(seed)
    names, numbers = np.unique(people.numpy(), return_inverse=True)
    fold_of = random.permutation(np.arange(len(names)) % min(FOLDS, len(names) // 2))[numbers]
    fold_a, fold_b = fold_of[rows], fold_of[columns]
    chosen = []
    for fold in np.unique(fold_of):
        inside = (fold_a == fold) & (fold_b == fold)
        own, others = np.flatnonzero(inside & genuine), np.flatnonzero(inside & ~genuine)
        size = min(len(own), len(others))
        chosen += [random.choice(own, size, replace=False), random.choice(others, size, replace=False)]
    balanced = np.concatenate(chosen)
    whole = verification(values, genuine, fmrs=FMRS)
    folded = verification(values[balanced], genuine[balanced], fold_a[balanced], fmrs=())
    return dataclasses.replace(whole, accuracy=folded.accuracy), values[~genuine]


class Times:
    """Seconds of every step, and of the forward and backward pass of its matrix."""

    def __init__(self) -> None:
        self.step: list[float] = []
        self.forward: list[float] = []
        self.backward: list[float] = []

    def watch_backward(self, scores: Tensor) -> None:
        """Takes the time of the backward pass of the node that made the scores."""
        node = scores.grad_fn
        assert node is not None
        start = 0.0

        def before(*_: object) -> None:
            nonlocal start
            start = time.perf_counter()

        def after(*_: object) -> None:
            self.backward.append(time.perf_counter() - start)

        node.register_prehook(before)
        node.register_hook(after)

    def summary(self) -> str:
        """Medians in words: on a shared machine some steps wait for others' work."""
        step, forward, backward = (statistics.median(part) for part in (self.step, self.forward, self.backward))
        return (
            f"{sum(self.step):.1f} s; a step {1e3 * step:.1f} ms (median), of which xcos_matrix forward "
            f"{1e3 * forward:.1f} ms ({forward / step:.0%}), backward {1e3 * backward:.1f} ms ({backward / step:.0%})"
        )


class Step(NamedTuple):
    """What one step of training was: loss, and the mean score of both kinds of pairs."""

    loss: float
    genuine: float
    impostor: float


def train(
    head: XCosHead,
    faces: Faces,
    batches: Batches,
    loss: Loss,
    *,
    steps: int,
    rate: float = 1e-3,
    teacher: float = 0.0,
    times: Times | None = None,
    report: Callable[[int, Step], None] | None = None,
) -> list[Step]:
    """Trains every parameter of a head that is in evaluation mode.

    Args:
        head: after :func:`fix_statistics`.
        faces: to train on.
        batches: draws from them.
        loss: of scores [B, B] and people [B].
        steps: number of batches.
        rate: Adam's learning rate at the start; falls to 0 along a cosine.
        teacher: weight of :func:`teacher_loss`.
        times: where to put seconds.
        report: called after every step with its number, from 1.

    Returns:
        One entry per step.

    Raises:
        ValueError: a teacher is asked for, but the network has no embeddings.
    """
    if teacher > 0 and faces.embeddings is None:
        raise ValueError("teacher: expected a network with an output block, got one without embeddings")
    times = Times() if times is None else times
    optimiser = torch.optim.Adam(head.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    done = []
    for number in range(1, steps + 1):
        start = time.perf_counter()
        chosen = batches.draw()
        people = faces.people[chosen]
        templates = head.templates(head.features(faces.grids[chosen].float()), role="both")
        forward = time.perf_counter()
        scores = xcos_matrix(templates, templates)
        times.forward.append(time.perf_counter() - forward)
        times.watch_backward(scores)
        value = loss(scores, people)
        if teacher > 0:
            assert faces.embeddings is not None
            value = value + teacher * teacher_loss(scores, faces.embeddings[chosen])
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        schedule.step()
        times.step.append(time.perf_counter() - start)
        genuine, impostor = kinds(people)
        done.append(Step(value.item(), scores[genuine].mean().item(), scores[impostor].mean().item()))
        if report is not None:
            report(number, done[-1])
    return done


# --- what the pairs would have cost


def pair_bytes(head: XCosHead, cells: int) -> int:
    """Bytes that plain autograd keeps of one pair in fp32, embeddings computed once per face.

    With h hidden channels: the attention's input (2 h), what its first convolution, batch norm and activation return
    (h each), what the second ones return (1 each) and the softmax, and the cell's cosine, for each cell.
    """
    hidden = 0 if head.attention is None else head.attention.hidden
    return 4 * cells * (2 * hidden + 3 * hidden + 4)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that ``run`` keeps for its backward pass, memory that several share counted once."""
    kept: dict[int, tuple[Tensor, int]] = {}  # the tensors too: freed memory could come back under its old address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for _, size in kept.values())


def every_pair(head: XCosHead, features: Tensor) -> Tensor:
    """The scores of :func:`all_pairs` as one writes them first: the head in plain torch on a list of B * B pairs."""
    assert head.attention is not None
    count = len(features)
    first, second = features.repeat_interleave(count, 0), features.repeat(count, 1, 1, 1)
    scores = reference.xcos_score(first, second, head.attention(first, second))
    assert isinstance(scores, Tensor)
    return scores.view(count, count)


def embedded_once(head: XCosHead, features: Tensor) -> Tensor:
    """The same with care: embeddings once per face, cosines as one product; the attention still sees every pair."""
    assert head.attention is not None and head.attention.fusable
    count = len(features)
    embedded = head.attention.embed(features)
    pairs = torch.cat((embedded.repeat_interleave(count, 0), embedded.repeat(count, 1, 1, 1)), 1)
    logits = head.attention.attention(pairs).flatten(1) / head.attention.temperature
    unit = F.normalize(features.flatten(2), dim=1)
    similarity = torch.einsum("pci,gci->pgi", unit, unit)
    return (logits.softmax(1).view_as(similarity) * similarity).sum(2)


IMPLEMENTATIONS: dict[str, Callable[[XCosHead, Tensor], Tensor]] = {
    "xcos_matrix": all_pairs,
    "eager, embedded once": embedded_once,
    "eager, every pair": every_pair,
}


class Cost(NamedTuple):
    """One way's step: seconds of each repetition, peak memory above what was there before [bytes], scores, gradient."""

    seconds: list[float]
    peak: int
    scores: np.ndarray
    gradient: np.ndarray


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}")


def measure(way: str, state: bytes, loss: str, pictures: int, threads: int, repeats: int) -> Cost:
    """Forward, loss and backward of one way; run in a process of its own, whose peak nothing else has raised."""
    torch.set_num_threads(threads)
    tensors = load(state)
    grids = tensors.pop("grids").float()
    head = XCosHead(grids.shape[1], attention=XCosAttention(symmetric=False)).eval()
    head.load_state_dict(tensors)
    people = torch.arange(len(grids)) // pictures  # who they really are does not matter for the cost
    compute_loss = make_loss(loss)

    def step(count: int) -> Tensor:
        head.zero_grad(set_to_none=True)
        scores = IMPLEMENTATIONS[way](head, head.features(grids[:count]))
        compute_loss(scores, people[:count]).backward()
        return scores.detach()

    step(2 * pictures)  # libraries loaded, threads started
    with contextlib.suppress(OSError):  # forget an earlier peak; where that is forbidden, it was a small one
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    scores = step(len(grids))
    peak = max(0, _resident("VmHWM") - before)
    gradient = head.conv1x1[0].weight.grad
    assert isinstance(gradient, Tensor)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(len(grids))
        seconds.append(time.perf_counter() - start)
    return Cost(seconds, peak, scores.numpy(), gradient.numpy().copy())


def compare(
    head: XCosHead, grids: Tensor, loss: str, pictures: int, *, rounds: int = 3, repeats: int = 5
) -> dict[str, Cost]:
    """One step of each way on the same faces, each in fresh processes; in turns, so that other load meets them all."""
    state = save({**{name: t.contiguous() for name, t in head.state_dict().items()}, "grids": grids.contiguous()})
    costs: dict[str, Cost] = {}
    for _ in range(rounds):
        for way in IMPLEMENTATIONS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                cost = pool.apply(measure, (way, state, loss, pictures, torch.get_num_threads(), repeats))
            known = costs.get(way, cost._replace(seconds=[]))
            costs[way] = cost._replace(seconds=known.seconds + cost.seconds, peak=max(known.peak, cost.peak))
    return costs


# --- the command


def megabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def print_comparison(costs: dict[str, Cost], faces: int) -> None:
    own = costs["xcos_matrix"]
    print(f"\none step (head, all {faces * faces} pairs, loss, backward), each way in fresh processes:")
    print("                               median ms (quartiles)   times   fastest   times   peak memory   times")
    for way, cost in costs.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(cost.seconds, n=4))
        fastest = 1e3 * min(cost.seconds)
        spread = f"{middle:.1f} ({low:.1f} - {high:.1f})"
        print(
            f"  {way:22}{spread:>28}{middle / (1e3 * statistics.median(own.seconds)):8.1f}{fastest:10.1f}"
            f"{fastest / (1e3 * min(own.seconds)):8.1f}{megabytes(cost.peak):>14}{cost.peak / max(own.peak, 1):8.1f}"
        )
    for way, cost in costs.items():
        if cost is not own:
            difference = float(np.abs(cost.scores - own.scores).max())
            gradient = float(np.abs(cost.gradient - own.gradient).max() / np.abs(own.gradient).max())
            print(f"  {way}: scores within {difference:.0e} of xcos_matrix's, gradient within {gradient:.0e}")


def print_report(name: str, report: VerificationReport) -> None:
    assert report.accuracy is not None
    points = "  ".join(f"{100 * point.tar:6.2f}" if point.resolved else "     -" for point in report.operating_points)
    print(
        f"  {name:24}{100 * report.accuracy.mean:6.2f} ± {100 * report.accuracy.std:.2f}   {report.auc:.5f}   "
        f"{100 * report.eer:6.2f}   {points}"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="aligned crops <person>/<picture>: folder or zip archive")
    parser.add_argument("--model", required=True, help="the recogniser's weights")
    parser.add_argument("--loss", choices=("infonce", "contrastive", "triplet"), default="infonce")
    parser.add_argument("--temperature", type=_above_zero, default=0.05, help="of infonce")
    parser.add_argument("--margin", type=float, help="of contrastive (default 0.3) and triplet (default 0.2)")
    parser.add_argument("--teacher", type=float, default=0.0, help="weight of the distance to the network's cosine")
    parser.add_argument("--people", type=_positive, default=64, help="people in a batch")
    parser.add_argument("--pictures-each", type=_positive, default=2, help="pictures of each of them")
    parser.add_argument("--steps", type=_positive, default=300)
    parser.add_argument("--rate", type=_above_zero, default=1e-3, help="learning rate")
    parser.add_argument("--faces", type=_positive, default=4000, help="use at most so many; each takes 50 kB")
    parser.add_argument("--per-person", type=_positive, default=8, help="use at most so many of one person")
    parser.add_argument("--held-out", type=_share, default=0.25, help="share of the people kept for verification")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=_positive, default=2)
    parser.add_argument("--every", type=_positive, default=25, help="steps between two printed lines")
    parser.add_argument("--compare", type=_positive, metavar="B", help="also measure one step of B faces without us")
    parser.add_argument("--out", type=Path, help="write network and trained head (.safetensors)")
    return parser


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    if options.out is not None and not options.out.parent.is_dir():
        raise ValueError(f"--out: {options.out.parent} is no folder")
    recogniser = load_recogniser(options.model)
    pictures = PersonFolder(options.pictures)
    enough = max(2, options.pictures_each)
    chosen = choose(pictures, options.faces, options.per_person, enough, options.seed)
    to_train, to_verify = hold_out(chosen, options.held_out)
    # Whatever can be wrong is found before the minutes that the network takes.
    batches = Batches(whose(to_train), options.people, options.pictures_each, options.seed)
    available = sum(map(len, to_train))
    if options.compare is not None and not 2 * enough <= options.compare <= available:
        raise ValueError(f"--compare: expected {2 * enough} to {available} faces, got {options.compare}")
    start = time.perf_counter()
    training, held_out = compute(recogniser, pictures, to_train), compute(recogniser, pictures, to_verify)
    seconds = time.perf_counter() - start
    channels, height, width = recogniser.grid_shape
    cells = height * width
    print(
        f"{available + len(held_out.people)} faces of {len(chosen)} people, maps computed in {seconds:.0f} s; "
        f"train on {available} of {len(to_train)}, verify {len(held_out.people)} of {len(to_verify)}"
    )

    head = XCosHead(channels, attention=XCosAttention(symmetric=False))  # the published form
    fix_statistics(head, training.grids, options.seed)
    before, _ = evaluate(head, held_out, options.seed)

    size = options.people * options.pictures_each
    features = head.features(training.grids[:size].float()).detach().requires_grad_()
    needed = size * size * pair_bytes(head, cells)
    kept = saved_bytes(lambda: all_pairs(head, features))
    print(
        f"{size} faces a batch: {size * size} pairs, of which plain autograd would keep {megabytes(needed)}; templates "
        f"and matrix keep {megabytes(kept)}"
    )

    def report(number: int, step: Step) -> None:
        if number == 1 or number % options.every == 0:
            print(
                f"step {number:5}  loss {step.loss:.4f}  genuine {step.genuine:+.3f}  impostor {step.impostor:+.3f}"
                f"  {1e3 * statistics.median(times.step):.0f} ms a step",
                flush=True,
            )

    times = Times()
    loss = make_loss(options.loss, options.temperature, options.margin)
    train(
        head,
        training,
        batches,
        loss,
        steps=options.steps,
        rate=options.rate,
        teacher=options.teacher,
        times=times,
        report=report,
    )
    print(times.summary())

    after, impostors = evaluate(head, held_out, options.seed)
    print(f"\nheld-out people: {after.pairs} pairs, {after.genuine} genuine")
    print(
        "                          accuracy %      AUC     EER %   TAR % at FMR " + ", ".join(map("{:g}".format, FMRS))
    )
    print_report("head before training", before)
    print_report("head after training", after)
    if held_out.embeddings is not None:
        cosine = held_out.embeddings @ held_out.embeddings.T
        print_report("network's own cosine", _report(cosine, held_out.people, options.seed)[0])

    if options.compare is not None:
        count = options.compare - options.compare % options.pictures_each
        costs = compare(head, training.grids[:count], options.loss, options.pictures_each)
        print_comparison(costs, count)

    if options.out is not None:
        points = {point.requested: point.threshold for point in after.operating_points if point.resolved}
        threshold = fmr_threshold(impostors, DECISION_FMR) if len(impostors) * DECISION_FMR >= 30 else None
        model = XCosModel(recogniser, head, threshold=threshold, fmr_thresholds=points, name=f"xcos-{options.loss}")
        save_model(model, options.out)
        print(f"\n{options.out}: {os.path.getsize(options.out)} bytes, threshold {threshold}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (OSError, ValueError) as error:  # what a user can mend: files, pictures, numbers
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
