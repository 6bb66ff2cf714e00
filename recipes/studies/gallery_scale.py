"""A gallery on disk, measured: enrolment, size, first and later searches, memory, cost against N, re-rank, ranks.

    python recipes/studies/gallery_scale.py --faces 1000000 --folder /tmp/xcos-scale

Generated faces: 10 of each person, a person's features drawn from a normal distribution, a face's at a distance from
them; probes are further faces of persons who are enrolled. Templates are of the published head (attention of one order,
fp16: 3,136 bytes of features and 1,568 of projections, 4,704 together; norms and biases are 392 more).

Every phase is a process of its own, so that its peak memory (VmHWM, memory maps included) is its own. "Cold" is after
dropping the system's page cache, which needs root; without it those figures are left out. Results go to
benchmarks/results/gallery/scale.json, the plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import RESULTS, machine, spread, write_json
from torch import Tensor

import xcos_ext
from xcos_ext.gallery import FaissIndex, Gallery
from xcos_ext.gallery.scoring import exact_topk
from xcos_ext.ops.templates import Templates

OUT = RESULTS / "gallery"
FACES_PER_PERSON = 10
BATCH = 16384
DISTANCE = 1.6  # of a face from its person, in standard deviations: mates are found, but not with ease
TEMPLATE_BYTES = 4704


def head() -> xcos_ext.XCosHead:
    """The published head with reproducible weights."""
    torch.manual_seed(5)
    made = xcos_ext.XCosHead(64, attention=xcos_ext.XCosAttention(symmetric=False)).eval()
    return made.requires_grad_(False)


def _features(persons: Tensor, seed: int) -> Tensor:
    """Features [N, 32, 7, 7] of one more face of each of these persons."""
    result = torch.empty(len(persons), 32, 7, 7)
    unique, inverse = persons.unique(return_inverse=True)
    centres = torch.stack([torch.randn(32, 7, 7, generator=torch.Generator().manual_seed(int(p))) for p in unique])
    noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
    return torch.add(centres[inverse], noise, alpha=DISTANCE, out=result)


def enrolled(start: int, stop: int, model: xcos_ext.XCosHead) -> Templates:
    """Templates of the faces [start, stop) of the gallery."""
    persons = torch.arange(start, stop) // FACES_PER_PERSON
    return model.templates(_features(persons, 10_000_000 + start), "gallery", torch.float16)


def probes(count: int, faces: int, model: xcos_ext.XCosHead) -> Templates:
    """Templates of probes whose mates are in a gallery of this many faces."""
    persons = torch.linspace(0, max(faces // FACES_PER_PERSON - 1, 0), count).to(torch.int64)
    return model.templates(_features(persons, 77), "probe", torch.float16)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peak_bytes() -> int:
    """Peak memory of this process, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def drop_page_cache() -> bool:
    """Make the next reads come from the disk; False where that is not allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


# ------------------------------------------------------------------ phases, each a process


def enrol(folder: Path, faces: int) -> dict[str, Any]:
    """Add all faces, a batch a commit; making the templates is not timed."""
    model = head()
    gallery = Gallery.create(folder, model)
    seconds = []
    for start in range(0, faces, BATCH):
        stop = min(start + BATCH, faces)
        templates = enrolled(start, stop, model)
        ids = [f"face-{i:08d}" for i in range(start, stop)]
        persons = [f"person-{i // FACES_PER_PERSON:07d}" for i in range(start, stop)]
        seconds.append(timed(lambda: gallery.add(ids, templates, persons=persons)) / (stop - start))  # noqa: B023
    rates = [1 / s for s in seconds]
    info = gallery.info()
    return {
        "faces": len(gallery),
        "seconds": sum(s * min(BATCH, faces - i * BATCH) for i, s in enumerate(seconds)),
        "faces_per_second": spread(rates),
        "faces_per_second_last_tenth": statistics.median(rates[-max(1, len(rates) // 10) :]),
        "commits": len(seconds),
        "bytes": info["bytes"],
        "bytes_per_face": info["bytes_per_face"],
        "times_template_bytes": info["bytes_per_face"] / TEMPLATE_BYTES,
    }


def first_search(folder: Path, faces: int) -> dict[str, Any]:
    """The first search: it packs the tiles."""
    return _one_search(folder, faces)


def later_process(folder: Path, faces: int) -> dict[str, Any]:
    """The first search of a process that finds packed tiles; it checks each tile once."""
    return _one_search(folder, faces)


def _one_search(folder: Path, faces: int) -> dict[str, Any]:
    some = probes(16, faces, head())
    begin = time.perf_counter()
    with Gallery.open(folder) as gallery:
        opened = time.perf_counter()
        first = timed(lambda: gallery.search(some, 10))
        again = timed(lambda: gallery.search(some, 10))
        tiles = gallery.info()["tiles_bytes"]
    return {"open_seconds": opened - begin, "search_seconds": first, "again_seconds": again, "tiles_bytes": tiles}


def cold_disk(folder: Path, faces: int) -> dict[str, Any]:
    """A cold search of packed tiles beside plain reading of the same files."""
    if not drop_page_cache():
        return {"left_out": "dropping the page cache needs root"}
    files = sorted((folder / "tiles").glob("*.arrow"))
    size = sum(f.stat().st_size for f in files)
    searches, reads = [], []
    some = probes(16, faces, head())
    for _ in range(3):
        drop_page_cache()
        reads.append(timed(lambda: _read(files)))
        drop_page_cache()
        with Gallery.open(folder) as gallery:
            searches.append(timed(lambda: gallery.search(some, 10)))
    return {
        "bytes": size,
        "read_bytes_per_second": spread([size / s for s in reads]),
        "search_bytes_per_second": spread([size / s for s in searches]),
        "share_of_reading": spread([r / s for r, s in zip(reads, searches, strict=True)]),
    }


def _read(paths: list[Path]) -> None:
    buffer = bytearray(16 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def against_memory(folder: Path, faces: int) -> dict[str, Any]:
    """Searching packed tiles beside the kernel on the same templates in memory."""
    model = head()
    count = min(faces, 196608)
    inside = Templates.cat([enrolled(s, min(s + BATCH, count), model) for s in range(0, count, BATCH)])
    rows = []
    with Gallery.open(folder) as gallery, torch.inference_mode():
        for width in (1, 16, 128):
            some = probes(width, faces, model)
            found = exact_topk(gallery.tiles(end=count), some, 10, "own")
            wanted = xcos_ext.xcos_topk(some, inside, 10)
            same = torch.equal(found.values, wanted.values) and torch.equal(found.indices, wanted.indices)
            disk, memory = [], []
            for _ in range(9):
                memory.append(timed(lambda: xcos_ext.xcos_topk(some, inside, 10)))  # noqa: B023
                disk.append(timed(lambda: exact_topk(gallery.tiles(end=count), some, 10, "own")))  # noqa: B023
            rows.append(
                {
                    "probes": width,
                    "faces": count,
                    "equal": same,
                    "memory_seconds": spread(memory),
                    "gallery_seconds": spread(disk),
                    "speed_of_memory": spread([m / d for m, d in zip(memory, disk, strict=True)]),
                }
            )
    return {"rows": rows}


def sizes(folder: Path, faces: int) -> dict[str, Any]:
    """Search of the first N faces, for N from 10,000 on."""
    some = {width: probes(width, faces, head()) for width in (1, 16)}
    counts = [n for n in (10_000, 30_000, 100_000, 300_000, 1_000_000) if n <= faces]
    rows = []
    with Gallery.open(folder) as gallery, torch.inference_mode():
        exact_topk(gallery.tiles(), some[1], 10, "own")  # every tile checked, as a process does once
        for count in counts:
            for width in some:
                rounds = 15 if count <= 100_000 else 7
                taken = [
                    timed(lambda: exact_topk(gallery.tiles(end=count), some[width], 10, "own"))  # noqa: B023
                    for _ in range(rounds)
                ]
                rows.append({"faces": count, "probes": width, "seconds": spread(taken)})
    fits = {}
    for width in some:
        n = np.array([r["faces"] for r in rows if r["probes"] == width], float)
        t = np.array([r["seconds"]["median"] for r in rows if r["probes"] == width])
        slope, intercept = np.polyfit(n, t, 1)
        residual = t - (slope * n + intercept)
        fits[str(width)] = {
            "seconds_per_million": slope * 1e6,
            "intercept_seconds": intercept,
            "r_squared": float(1 - (residual**2).sum() / ((t - t.mean()) ** 2).sum()),
        }
    return {"rows": rows, "fits": fits}


def two_stages(folder: Path, faces: int) -> dict[str, Any]:
    """Recall and speed of a coarse stage with exact re-rank, beside the exact search."""
    some = probes(64, faces, head())
    with Gallery.open(folder) as gallery:
        return {"rows": _two_stages(gallery, some, None)}


def two_stages_lfw(folder: Path, faces: int) -> dict[str, Any]:
    """The same on real faces: LFW's pictures, by the shipped model; a probe does not find itself."""
    from xcos_ext.gallery.dedupe import as_probes
    from xcos_ext.gallery.enroll import enroll, find_pictures

    archive = Path(os.environ.get("XCOS_SHARED_DATA", RESULTS.parent.parent.parent / "shared" / "data")) / "lfw112.zip"
    if not archive.exists():
        return {"left_out": f"no {archive.name}"}
    lfw = folder.with_name(folder.name + "-lfw")
    shutil.rmtree(lfw, ignore_errors=True)
    model = xcos_ext.load_model()
    try:
        with Gallery.create(lfw, model) as gallery:
            done = enroll(gallery, model, find_pictures([archive])[0])
            gallery.compact()
            chosen = np.linspace(0, len(gallery) - 1, 64).astype(int).tolist()
            stored = gallery.templates_at(chosen)
            some = as_probes(gallery.layout, stored, model.head)
            ids = list(gallery.ids())
            rows = _two_stages(gallery, some, [[ids[i]] for i in chosen])
            return {
                "faces": len(gallery),
                "pictures_per_second": len(done.enrolled) / done.seconds,
                "rows": rows,
            }
    finally:
        shutil.rmtree(lfw, ignore_errors=True)


def _two_stages(
    gallery: Gallery, some: Templates, exclude: list[list[str]] | None, ways: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Rows for each way to find candidates, by its name."""
    rows = []
    for width in (1, 64):
        few, own = some[:width], None if exclude is None else exclude[:width]

        def search(**options: Any) -> Any:
            return gallery.search(few, 10, exclude=own, metadata=False, **options)  # noqa: B023

        search()
        for name, coarse in (ways or {"uniform": "uniform", "norm": "norm"}).items():
            for count in (100, 1000):
                exact, fast = [], []
                for _ in range(5):
                    exact.append(timed(search))
                    fast.append(timed(lambda: search(rerank=count, coarse=coarse)))  # noqa: B023
                found = gallery.search(
                    some, 10, exclude=exclude, metadata=False, rerank=count, coarse=coarse, recall_probes=len(some)
                )
                rows.append(
                    {
                        "probes": width,
                        "coarse": name,
                        "rerank": count,
                        "recall_at_10": found.recall,
                        "recall_probes": found.recall_probes,
                        "exact_seconds": spread(exact),
                        "seconds": spread(fast),
                        "speedup": spread([e / f for e, f in zip(exact, fast, strict=True)]),
                    }
                )
    return rows


def faiss(folder: Path, faces: int) -> dict[str, Any]:
    """Candidates from a faiss index, which is in memory, beside the exact search."""
    some = probes(64, faces, head())
    rows = []
    with Gallery.open(folder) as gallery:
        built = time.perf_counter()
        index = FaissIndex.build(gallery)
        seconds = time.perf_counter() - built
        for lists in (16, 128):
            index.lists = lists
            rows += _two_stages(gallery, some, None, {f"faiss, {lists} lists": index})
    return {"build_seconds": seconds, "rows": rows}


def remove_and_compact(folder: Path, faces: int) -> dict[str, Any]:
    """Remove one face in a hundred, and compact; the last phase, since it changes the gallery."""
    with Gallery.open(folder) as gallery:
        ids = [f"face-{i:08d}" for i in range(0, faces, 100)]
        removed = timed(lambda: gallery.remove(ids))
        compacted = timed(gallery.compact)
        return {
            "removed": len(ids),
            "remove_seconds": removed,
            "compact_seconds": compacted,
            "faces": len(gallery),
            "bytes_per_face": gallery.info()["bytes_per_face"],
        }


PHASES = {
    "enrol": enrol,
    "first_search": first_search,
    "later_process": later_process,
    "against_memory": against_memory,
    "sizes": sizes,
    "two_stages": two_stages,
    "two_stages_lfw": two_stages_lfw,
    "faiss": faiss,
    "cold_disk": cold_disk,
    "remove_and_compact": remove_and_compact,
}


def ranks(folder: Path, faces: int) -> dict[str, Any]:
    """The same search on one rank and on two, one thread each."""
    found = {}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [__file__, "--rank", "--folder", str(folder), "--faces", str(faces)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(f"ranks failed: {done.stderr[-2000:]}")
        found[str(count)] = json.loads(lines[-1])
    one, two = found["1"]["seconds"]["median"], found["2"]["seconds"]["median"]
    return {"threads_a_rank": 1, "by_ranks": found, "speedup": one / two}


def one_rank(folder: Path, faces: int) -> None:
    """What torchrun starts for :func:`ranks`."""
    import torch.distributed as dist

    from xcos_ext.gallery import ShardedGallery

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    some = probes(16, faces, head())
    with ShardedGallery.open(folder) as gallery:
        gallery.search(some, 10, metadata=False)
        taken = [timed(lambda: gallery.search(some, 10, metadata=False)) for _ in range(7)]
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": spread(taken), "probes": 16}), flush=True)
    dist.destroy_process_group()


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds of a search against the number of faces."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for width, marker in ((1, "o"), (16, "s")):
        rows = [r for r in result["phases"]["sizes"]["rows"] if r["probes"] == width]
        fit = result["phases"]["sizes"]["fits"][str(width)]
        n = np.array([r["faces"] for r in rows], float)
        axes.plot(
            n,
            [1e3 * r["seconds"]["median"] for r in rows],
            marker,
            label=f"{width} probe{'s' * (width > 1)}, measured",
        )
        line = 1e3 * (fit["intercept_seconds"] + fit["seconds_per_million"] * n / 1e6)
        axes.plot(
            n, line, "-", lw=1, label=f"{1e3 * fit['seconds_per_million']:.0f} ms a million, R² {fit['r_squared']:.4f}"
        )
    axes.set(xscale="log", yscale="log", xlabel="faces in the gallery", ylabel="search, milliseconds")
    axes.set_title("Exact learned-attention search of packed tiles")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="for the gallery; about 11 KB a face")
    parser.add_argument("--phases", nargs="*", help="only these, into the results that are there")
    parser.add_argument("--keep", action="store_true", help="leave the gallery")
    parser.add_argument("--json", type=Path, default=OUT / "scale.json")
    parser.add_argument("--plot", type=Path, help="[default: beside the JSON]")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return one_rank(options.folder, options.faces)
    if options.phase:
        result = PHASES[options.phase](options.folder, options.faces)
        print(json.dumps({**result, "peak_bytes": peak_bytes()}), flush=True)
        return None
    names = options.phases or [*[*PHASES][:-1], "ranks", "remove_and_compact"]
    report: dict[str, Any] = {"schema": 1, "faces": options.faces, "phases": {}}
    if options.phases and options.json.exists():
        report = json.loads(options.json.read_text())
    if "enrol" in names:
        shutil.rmtree(options.folder, ignore_errors=True)
    for name in names:
        if name == "ranks":
            found = ranks(options.folder, options.faces)
        else:
            command = [sys.executable, __file__, "--phase", name, "--folder", str(options.folder)]
            done = subprocess.run(
                [*command, "--faces", str(options.faces)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
        report["phases"][name] = found
        print(name, json.dumps(found, indent=1), flush=True)
    report["machine"] = machine()
    write_json(options.json, report)
    if "sizes" in report["phases"]:
        plot(report, options.plot or options.json.with_suffix(".png"))
    if not options.keep:
        shutil.rmtree(options.folder, ignore_errors=True)
    return None


if __name__ == "__main__":
    main()
