"""Galleries whose processes are killed (SIGKILL) in the middle of what they do, again and again.

    python tests/support/gallery_faults_driver.py --kills 200 --seed 0

A child process adds, replaces or removes faces, compacts, or packs the tiles of a first search, and writes a line to a
log when a commit begins and when it has returned. It is killed a random time after such a line; the times are drawn
from how long that operation has been seen to take. Afterwards, each time: the gallery opens; it holds what was reported
as committed and perhaps the one commit that was under way, wholly or not at all, bit for bit; everything verifies; a
search gives exactly what `xcos_topk` gives over those faces in memory; and a new writer writes at once. Every gallery
goes through many kills; in the end it is compacted, and nothing that was removed is left in any file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import xcos_ext
from xcos_ext.gallery import Gallery
from xcos_ext.ops.templates import Templates

POOL = 1500  # different faces
KINDS = ("add", "replace", "remove", "compact", "tiles")
KILLS_A_GALLERY = 20
K = 20


def pool() -> tuple[Templates, Templates]:
    """Faces and probes, the same in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    head = xcos_ext.XCosHead(64, attention=xcos_ext.XCosAttention(symmetric=False)).eval().requires_grad_(False)
    faces = head.templates(torch.randn(POOL, 32, 7, 7), "gallery", torch.float16)
    return faces, head.templates(torch.randn(5, 32, 7, 7), "probe", torch.float16)


def person(row: int) -> str | None:
    return None if row % 10 == 0 else f"person-{row % 61}"


def metadata(name: str, row: int) -> dict[str, Any]:
    return {"row": row, "note": f"of {name}"}


def add(gallery: Gallery, faces: Templates, step: dict[str, Any], **options: Any) -> None:
    """Add a step's faces with their labels."""
    names, rows = step["ids"], step["rows"]
    labels = [metadata(*pair) for pair in zip(names, rows, strict=True)]
    gallery.add(names, faces[rows], persons=[person(row) for row in rows], metadata=labels, **options)


# ------------------------------------------------------------------ the process that is killed


def work(job: dict[str, Any], faces: Templates, probes: Templates) -> None:
    """Do what the job says, and say so."""
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)

    def say(*words: object) -> None:
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    try:
        gallery = Gallery.open(job["gallery"])
        for index, step in enumerate(job["steps"]):
            say("begin", index)
            begin = time.perf_counter()
            operation = step["operation"]
            if operation in ("add", "replace"):
                add(gallery, faces, step, on_duplicate="replace" if operation == "replace" else "error")
            elif operation == "remove":
                gallery.remove(step["ids"])
            elif operation == "compact":
                gallery.compact()
            else:
                gallery.search(probes, K)
            say("done", index, time.perf_counter() - begin)
        gallery.close()
    except BaseException:
        say("error", json.dumps(traceback.format_exc()))


def serve() -> None:
    """Fork a child for every job: imports are done once, and Lance's threads, which no fork survives, never begin."""
    faces, probes = pool()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(json.loads(line), faces, probes)
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


class Children:
    """The process that forks the children."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def start(self, job: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def wait(self) -> None:
        assert self._answer() == "gone"

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


# ------------------------------------------------------------------ what must be true afterwards

State = list[tuple[str, int]]  # ids and rows of the pool, by position


def after(state: State, step: dict[str, Any]) -> State:
    """What a step makes of a gallery."""
    names, rows = step.get("ids", []), step.get("rows", [])
    if step["operation"] in ("replace", "remove"):
        gone = set(names)
        state = [pair for pair in state if pair[0] not in gone]
    return state + list(zip(names, rows, strict=True)) if step["operation"] in ("add", "replace") else state


def matches(found: list[str], state: State, loose: int) -> bool:
    """Whether a gallery's ids are a state's; the order of the last ``loose``, which were replaced, is Lance's."""
    names = [name for name, _ in state]
    cut = len(names) - loose
    return found[:cut] == names[:cut] and sorted(found[cut:]) == sorted(names[cut:])


class Violation(Exception):
    """A promise that was not kept."""


def require(condition: Any, what: str) -> None:
    if not condition:
        raise Violation(what)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Trial:
    """A gallery, what must be in it, and what is done to it."""

    def __init__(self, folder: Path, number: int, faces: Templates, probes: Templates, rng: random.Random) -> None:
        self.folder = folder / f"g{number}"
        self.log = folder / "log"
        self.faces, self.probes, self.rng = faces, probes, rng
        self.prefix, self.count = f"g{number}-", 0
        self.removed: list[tuple[str, int]] = []
        self.state: State = []
        with Gallery.create(self.folder, faces) as gallery:
            for _ in range(3):
                self._add(gallery, 200)

    def _add(self, gallery: Gallery, count: int) -> None:
        step = self.new(count)
        add(gallery, self.faces, step)
        self.state = after(self.state, step)

    def new(self, count: int) -> dict[str, Any]:
        names = [f"{self.prefix}{self.count + i:06d}-face" for i in range(count)]
        self.count += count
        return {"operation": "add", "ids": names, "rows": [self.rng.randrange(POOL) for _ in names]}

    def some(self, state: State, most: int) -> list[str]:
        count = min(self.rng.randint(10, most), len(state) // 2)
        return [name for name, _ in self.rng.sample(state, count)]

    def steps(self, kind: str) -> tuple[list[dict[str, Any]], int]:
        """What a child shall do, and the step in which it shall die."""
        rng = self.rng
        if kind == "add":
            steps = [self.new(rng.randint(20, 250)) for _ in range(3)]
            return steps, rng.randrange(3)
        if kind == "replace":
            names = self.some(self.state, 100)
            step = self.new(10)
            names = names + step["ids"]
            return [{"operation": "replace", "ids": names, "rows": [rng.randrange(POOL) for _ in names]}], 0
        most = max(11, len(self.state) - 600)
        if kind == "remove":
            first = self.some(self.state, most)
            left = [pair for pair in self.state if pair[0] not in set(first)]
            steps = [{"operation": "remove", "ids": ids} for ids in (first, self.some(left, 60))]
            return steps, rng.randrange(2)
        if kind == "compact":
            return [{"operation": "remove", "ids": self.some(self.state, most)}, {"operation": "compact"}], 1
        shutil.rmtree(self.folder / "tiles", ignore_errors=True)
        return [{"operation": "tiles"}], 0

    def check(self, steps: list[dict[str, Any]], reported: int) -> int:
        """Check everything after a kill; returns how many steps are in effect.

        Args:
            steps: that the child was to take.
            reported: how many it had reported.
        """
        with Gallery.open(self.folder, timeout=0.0) as gallery:
            found = list(gallery.ids())
            state, effect = self.state, None
            for step in steps[:reported]:
                self.removed += [pair for pair in state if pair not in set(after(state, step))]
                state = after(state, step)
            for done in (reported, reported + 1):
                if done > reported:
                    if done > len(steps):
                        break
                    gone = set(after(state, steps[reported]))
                    removed = [pair for pair in state if pair not in gone]
                    state = after(state, steps[reported])
                last = steps[done - 1] if done else {"operation": "none"}
                if matches(found, state, len(last["ids"]) if last["operation"] == "replace" else 0):
                    effect = done
                    if done > reported:
                        self.removed += removed
                    break
            require(
                effect is not None, f"{len(found)} ids are neither those before nor those after the commit under way"
            )
            rows = dict(state)
            self.state = [(name, rows[name]) for name in found]
            require(len(gallery) == len(found), "the number of faces is not that of the ids")
            report = gallery.verify()
            require(report["ok"] and report["faces"] == len(found), f"verify: {report}")
            templates, labels = gallery.get(found)
            wanted = self.faces[[rows[name] for name in found]]
            for array in ("features", "norms", "projection", "bias"):
                require(torch.equal(getattr(templates, array), getattr(wanted, array)), f"stored {array} differ")
            require(
                labels == [{"id": n, "person": person(r), "metadata": metadata(n, r)} for n, r in self.state],
                "labels differ",
            )
            expected = xcos_ext.xcos_topk(self.probes, wanted, K)
            for turn in ("first", "later"):
                hits = gallery.search(self.probes, K)
                same = torch.equal(hits.scores, expected.values) and torch.equal(hits.positions, expected.indices)
                require(same, f"the {turn} search differs from the one in memory")
                require(hits.ids == [[found[i] for i in row] for row in expected.indices.tolist()], "hits' ids differ")
            self._add(gallery, 1)  # with a timeout of 0: no lock may be left
            require(list(gallery.ids()) == [name for name, _ in self.state], "the next commit did not add one face")
        return effect or 0

    def finish(self) -> int:
        """Compact, then look for anything that should be gone; returns how many removed faces were looked for."""
        with Gallery.open(self.folder, timeout=0.0) as gallery:
            gallery.search(self.probes, K)
            gallery.compact()
            gallery.search(self.probes, K)
            require(list(gallery.ids()) == [name for name, _ in self.state], "compaction changed the ids")
            require(gallery.verify()["ok"], "compaction damaged the gallery")
        names = tree(self.folder)
        kinds = Counter("/".join(name.split("/")[:-1]) or name for name in names)
        expected = {
            "writer.lock": 1,
            "readers": 1,
            "commits.log": 1,
            "tiles": 1,
            "templates.lance/data": 1,
            "templates.lance/_versions": 2,
            "templates.lance/_transactions": 1,
        }
        require(kinds == expected, f"files that should not be there after compaction: {sorted(names)}")
        everything = b"\0".join((self.folder / name).read_bytes() for name in sorted(names))
        there = {row for _, row in self.state}
        looked = self.rng.sample(self.removed, min(40, len(self.removed)))
        for name, row in looked:
            if name not in dict(self.state):
                require(name.encode() not in everything, f"the removed id {name} is still in a file")
            if row not in there:
                sample = self.faces.features[row].numpy().tobytes()[512:768]
                require(sample not in everything, f"the template of the removed {name} is still in a file")
        return len(looked)


# ------------------------------------------------------------------ killing


class Faults:
    """All kills and what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.faces, self.probes = pool()
        self.children = Children()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.hits: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.galleries = self.looked = 0

    def _lines(self, trial: Trial) -> list[list[str]]:
        return [line.split(" ", 1) for line in trial.log.read_text().splitlines()]

    def run(self, trial: Trial, steps: list[dict[str, Any]], target: int, delay: float | None) -> int:
        """Have a child take steps; kill it ``delay`` seconds into the target. Returns how many it reported."""
        trial.log.write_text("")
        child = self.children.start({"log": str(trial.log), "gallery": str(trial.folder), "steps": steps})
        if delay is not None:
            limit = time.monotonic() + 60
            while ["begin", str(target)] not in (lines := self._lines(trial)):
                if any(word == "error" for word, *_ in lines) or time.monotonic() > limit:
                    break
                time.sleep(0.0005)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):  # the server has not waited for it: the number is its own
                os.kill(child, signal.SIGKILL)
        self.children.wait()
        reported = 0
        for word, *rest in self._lines(trial):
            if word == "error":
                raise Violation("the child failed: " + json.loads(rest[0])[-1500:])
            if word == "done":
                index, seconds = rest[0].split(" ")
                reported = int(index) + 1
                self.seconds[steps[int(index)]["operation"]].append(float(seconds))
        return reported

    def once(self, trial: Trial, kind: str) -> None:
        """One kill."""
        known = self.seconds[kind][-15:]
        steps, target = trial.steps(kind)
        delay = (
            self.rng.uniform(0, 1.05 * max(known))
            if self.rng.random() < 0.2
            else self.rng.uniform(0, 1.05 * statistics.median(known))
        )
        reported = self.run(trial, steps, target, delay)
        self.kills[kind] += 1
        self.hits[kind] += reported <= target
        trial.check(steps, reported)

    def trials(self, kills: int) -> Iterator[tuple[int, Trial, str]]:
        trial = None
        order: list[str] = []
        for number in range(kills):
            if trial is None or number % KILLS_A_GALLERY == 0:
                if trial is not None:
                    self.end(trial, number)
                trial = Trial(self.folder, self.galleries, self.faces, self.probes, self.rng)
                self.galleries += 1
            if not order:
                order = list(KINDS)
                self.rng.shuffle(order)
            yield number, trial, order.pop()
        if trial is not None:
            self.end(trial, kills)

    def end(self, trial: Trial, number: int) -> None:
        with self.noting(number, "finish"):
            self.looked += trial.finish()
        if not self.failures:
            shutil.rmtree(trial.folder)

    @contextlib.contextmanager
    def noting(self, number: int, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = str(error) if isinstance(error, Violation) else traceback.format_exc()
            self.failures.append({"kill": number, "operation": kind, "failure": text})
            print(f"kill {number} ({kind}): {text}", flush=True)

    def calibrate(self) -> None:
        """How long the operations take."""
        trial = Trial(self.folder, 999, self.faces, self.probes, self.rng)
        for kind in [*KINDS, *KINDS]:
            steps, target = trial.steps(kind)
            reported = self.run(trial, steps, target, None)
            trial.check(steps, reported)
        shutil.rmtree(trial.folder)

    def all(self, kills: int) -> None:
        self.calibrate()
        for number, trial, kind in self.trials(kills):
            with self.noting(number, kind):
                self.once(trial, kind)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} kills, {sum(self.hits.values())} during the operation", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the galleries [default: a temporary one]")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        faults = Faults(Path(folder), options.seed)
        try:
            faults.all(options.kills)
        finally:
            faults.children.close()
    for kind in KINDS:
        print(f"{kind:8} {faults.kills[kind]:4} kills, {faults.hits[kind]:4} during the operation")
    print(f"{len(faults.failures)} failures; {faults.looked} removed faces looked for in all files")
    return 1 if faults.failures else 0


if __name__ == "__main__":
    sys.exit(main())
