"""The training engine: resuming, several processes, accumulation, averages, files, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn
from training_toy import Toy, settings, state

from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import ModelError, XCosError
from xcos_ext.training import BatchIndex, TrainConfig, train
from xcos_ext.training.engine import warmup_cosine
from xcos_ext.training.optimiser import MuonAdamW, orthogonalised
from xcos_ext.training.parallel import prefetch, processes
from xcos_ext.training.settings import ConfigError
from xcos_ext.training.state import averaged_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOY = str(REPOSITORY / "tests" / "support" / "training_toy.py")


def run(out: Path, *assignments: str, launcher: tuple[str, ...] = (), **environment: str) -> Any:
    """The toy as a program of its own; its result, or None if it was killed."""
    done = subprocess.run(
        [sys.executable, *launcher, TOY, str(out), *assignments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode < 0:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0])


def assert_equal(first: Path, second: Path) -> None:
    """Both folders' checkpoints are the same to the bit."""
    (a, values_a), (b, values_b) = state(first), state(second)
    assert values_a == values_b
    assert a.keys() == b.keys()
    assert any(name.startswith("ema/") for name in a) and any(name.startswith("optimiser/") for name in a)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


class TestResuming:
    @pytest.mark.process
    @pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
    def test_killed_and_resumed_is_never_killed(self, tmp_path: Path, optimiser: str) -> None:
        options = (f"optimiser={optimiser}", "accumulate=2", "checkpoint_every=7", "log_every=4")
        whole = run(tmp_path / "whole", *options)
        assert run(tmp_path / "killed", *options, TOY_KILL_AT="17") is None
        assert state(tmp_path / "killed")[1]["step"] == 14
        resumed = run(tmp_path / "killed", *options)
        assert resumed == whole | {"resumed": 14}
        assert_equal(tmp_path / "whole", tmp_path / "killed")
        rows = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "killed")]
        for a, b in zip(*rows, strict=True):
            assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
        models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
        assert models[0] == models[1]

    @pytest.mark.process
    def test_a_run_killed_before_its_first_checkpoint_starts_again(self, tmp_path: Path) -> None:
        assert run(tmp_path, TOY_KILL_AT="3") is None
        assert not (tmp_path / "checkpoint.safetensors").exists()
        assert run(tmp_path)["resumed"] == 0

    def test_a_finished_training_only_exports_again(self, tmp_path: Path) -> None:
        first = train(Toy(), settings(), tmp_path, show=False)
        (tmp_path / "model.safetensors").unlink()
        again = train(Toy(), settings(), tmp_path, resume=True, show=False)
        assert (again.steps, again.resumed, again.loss) == (40, 40, first.loss)
        assert again.metrics == first.metrics and (tmp_path / "model.safetensors").is_file()

    def test_a_relative_folder_stays_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path)
        options = settings(steps=4, checkpoint_every=2, log_every=1)
        result = train(Toy(), options, "out", show=False, on_step=lambda *_: os.chdir(tmp_path / "there"))
        assert {path.parent for path in result.files} == {tmp_path / "out"} and not list((tmp_path / "there").iterdir())
        assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 5

    def test_a_folder_is_not_overwritten(self, tmp_path: Path) -> None:
        train(Toy(), settings(steps=2), tmp_path, show=False)
        with pytest.raises(XCosError, match=r"holds a training already; resume it \(--resume\) or choose another"):
            train(Toy(), settings(steps=2), tmp_path, show=False)

    def test_another_training_is_refused_by_name(self, tmp_path: Path) -> None:
        train(Toy(), settings(steps=2), tmp_path, show=False)
        with pytest.raises(ModelError, match=r"other settings: train.rate \(checkpoint 0.01, now 0.02\), train.steps"):
            train(Toy(), settings(steps=3, rate=0.02), tmp_path, resume=True, show=False)
        with pytest.raises(ModelError, match=r"another architecture: 0.bias \(checkpoint float32 \[16\], now float"):
            train(Toy(17), settings(steps=2), tmp_path, resume=True, show=False)
        # What does not change results may change.
        train(Toy(), settings(steps=2, workers=0, log_every=1), tmp_path, resume=True, show=False)

    @pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
    def test_a_damaged_checkpoint_is_named(self, tmp_path: Path, keep: float) -> None:
        train(Toy(), settings(steps=2), tmp_path, show=False)
        path = tmp_path / "checkpoint.safetensors"
        contents = path.read_bytes()
        path.write_bytes(contents[: int(keep if keep >= 1 else keep * len(contents))])
        with pytest.raises(ModelError, match=r"checkpoint.safetensors: (damaged|the file is empty)"):
            train(Toy(), settings(steps=2), tmp_path, resume=True, show=False)

    def test_weights_are_no_checkpoint(self, tmp_path: Path) -> None:
        train(Toy(), settings(steps=2), tmp_path, show=False)
        shutil.copy(tmp_path / "model.safetensors", tmp_path / "checkpoint.safetensors")
        with pytest.raises(ModelError, match="not a training checkpoint"):
            train(Toy(), settings(steps=2), tmp_path, resume=True, show=False)


class TestFullDisk:
    @pytest.mark.process
    def test_the_checkpoint_before_survives(self, tmp_path: Path) -> None:
        run(tmp_path, "steps=10", "checkpoint_every=5")
        before = (tmp_path / "checkpoint.safetensors").read_bytes()
        done = subprocess.run(
            [sys.executable, TOY, str(tmp_path), "steps=10"],
            env={**os.environ, "TOY_LIMIT": "4000"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode != 0 and "cannot be written" in done.stderr
        assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
        assert not list(tmp_path.glob(".*.tmp"))

    def test_training_goes_on_after_a_checkpoint_failed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from xcos_ext.training.state import Checkpoint

        save, calls = Checkpoint.save, []

        def failing(checkpoint: Checkpoint, path: Path) -> None:
            calls.append(checkpoint.step)
            if checkpoint.step == 4:
                raise OutputError(f"{path}: cannot be written: No space left on device")
            save(checkpoint, path)

        monkeypatch.setattr(Checkpoint, "save", failing)
        train(Toy(), settings(steps=6, checkpoint_every=2), tmp_path)
        assert calls == [2, 4, 6] and state(tmp_path)[1]["step"] == 6
        assert "No space left on device; the checkpoint before it is kept" in capsys.readouterr().err


class TestTheSameWhateverTheSplit:
    def final(self, **changes: Any) -> list[Tensor]:
        toy = Toy(dropout=0.0, norm=False)
        train(toy, settings(**changes), show=False)
        return [p.detach() for p in toy.module.parameters()]

    def test_workers_change_nothing(self) -> None:
        for a, b in zip(self.final(workers=0), self.final(workers=3), strict=True):
            assert torch.equal(a, b)

    def test_accumulation_is_one_batch(self) -> None:
        for a, b in zip(self.final(), self.final(accumulate=4), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.process
    def test_two_processes_are_one(self, tmp_path: Path) -> None:
        environment = {"TOY_DROPOUT": "0", "TOY_NORM": "0"}
        two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        alone = run(tmp_path / "one", "log_every=5", **environment)
        together = run(tmp_path / "two", "log_every=5", launcher=two, **environment)
        assert together["steps"] == 40 and together["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        (a, _), (b, _) = state(tmp_path / "one"), state(tmp_path / "two")
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
        rows = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two")]
        for first, second in zip(*rows, strict=True):
            assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-3)
        with pytest.raises(AssertionError, match=r"train.batch: expected a multiple of 2 \(2 processes x 1 micro"):
            run(tmp_path / "odd", "batch=15", launcher=two)

    @pytest.mark.process
    def test_two_processes_resume_to_the_bit(self, tmp_path: Path) -> None:
        two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        options = ("checkpoint_every=7", "steps=20")
        run(tmp_path / "whole", *options, launcher=two)
        with pytest.raises(AssertionError):  # the launcher tells of the killed processes
            run(tmp_path / "killed", *options, launcher=two, TOY_KILL_AT="9")
        assert state(tmp_path / "killed")[1]["step"] == 7
        assert run(tmp_path / "killed", *options, launcher=two)["resumed"] == 7
        assert_equal(tmp_path / "whole", tmp_path / "killed")
        with pytest.raises(AssertionError, match=r"processes \(checkpoint 2, now 1\)"):
            run(tmp_path / "whole", *options)

    def test_a_part_is_its_share_of_the_whole(self) -> None:
        whole = torch.arange(12)
        parts = [BatchIndex(0, 5, part, 3).slice_of(whole) for part in range(3)]
        assert torch.equal(torch.cat(parts), whole)
        shared = [torch.rand(4, generator=BatchIndex(7, 5, part, 3).generator()) for part in range(3)]
        assert torch.equal(shared[0], shared[2])
        own = [torch.rand(4, generator=BatchIndex(7, 5, part, 3).generator(own=True)) for part in range(3)]
        assert not torch.equal(own[0], own[2]) and not torch.equal(own[0], shared[0])
        with pytest.raises(ValueError, match="expected a multiple of 5 samples, got 12"):
            BatchIndex(0, 0, 0, 5).slice_of(whole)


class TestWhatItDoes:
    @pytest.mark.thorough
    def test_the_loss_falls_and_averages_are_judged(self, tmp_path: Path) -> None:
        toy = Toy()
        seen: list[int] = []
        result = train(
            toy, settings(steps=300, ema=0.95), tmp_path, show=False, on_step=lambda step, values: seen.append(step)
        )
        assert seen == list(range(10, 301, 10))
        rows = list(csv.DictReader((tmp_path / "log.csv").open()))
        assert list(rows[0]) == ["step", "loss", "rate", "absolute", "gradient", "seconds"]
        assert float(rows[-1]["loss"]) < 0.3 * float(rows[0]["loss"])
        assert result.metrics["error"] < 8.0 / 4
        tensors, _ = state(tmp_path)
        exported = dict(tensors)
        own, average = exported["module/0.weight"], exported["ema/0.weight"]
        assert torch.equal(toy.module[0].weight, own) and not torch.equal(own, average)
        assert toy.module.training  # evaluation put it back
        assert list(csv.DictReader((tmp_path / "evaluations.csv").open()))[-1]["step"] == "300"

    def test_evaluations_on_the_way(self, tmp_path: Path) -> None:
        train(Toy(), settings(steps=10, evaluate_every=4), tmp_path, show=False)
        assert [row["step"] for row in csv.DictReader((tmp_path / "evaluations.csv").open())] == ["4", "8", "10"]

    def test_nothing_is_written_without_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert train(Toy(), settings(steps=2), show=False).files == []
        assert not list(tmp_path.iterdir())

    def test_autocast(self) -> None:
        dtypes = []

        class Watching(Toy):
            def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
                dtypes.append(self.module[0](batch["inputs"]).dtype)
                return super().loss(batch)

        train(Watching(), settings(steps=2, amp="bf16"), show=False)
        assert set(dtypes) == {torch.bfloat16}

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train(Toy(), settings(steps=4, log_every=2, tensorboard=True), tmp_path, show=False)
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
        assert events.Scalars("evaluation/error")[0].step == 4

    def test_lines_off_a_terminal(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("xcos_ext.training.logs._SECONDS_BETWEEN_LINES", 0.0)
        train(Toy(), settings(steps=4, log_every=2))
        shown = capsys.readouterr().err.splitlines()
        assert shown[0].startswith("step 2 of 4  loss ") and "s left" in shown[0]
        assert shown[-1].startswith("step 4: error ")
        train(Toy(), settings(steps=4, log_every=2), show=False)
        assert capsys.readouterr().err == ""

    def test_the_callers_random_numbers_are_untouched(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        toy = Toy()
        torch.manual_seed(1)
        train(toy, settings(steps=2), show=False)
        assert torch.equal(torch.rand(3), expected)


class TestWhatItRefuses:
    def test_a_loss_that_is_not_finite(self) -> None:
        class Broken(Toy):
            def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
                value, parts = super().loss(batch)
                return value * (math.nan if batch["step"] == 3 else 1.0), parts

        with pytest.raises(XCosError, match=r"step 4: the loss is nan; lower train.rate or set train.clip"):
            train(Broken(), settings(), show=False)

    def test_errors_of_batches_come_through(self) -> None:
        class Broken(Toy):
            def batch(self, index: BatchIndex, size: int) -> dict[str, Any]:
                if index.step == 2:
                    raise XCosError("no such picture")
                return super().batch(index, size)

        for workers in (0, 2):
            threads = threading.active_count()
            with pytest.raises(XCosError, match="no such picture"):
                train(Broken(), settings(workers=workers), show=False)
            assert threading.active_count() == threads

    def test_parameters_of_another_module(self) -> None:
        class Broken(Toy):
            def parameter_groups(self) -> list[dict[str, Any]]:
                return [{"params": [nn.Parameter(torch.zeros(3))]}]

        with pytest.raises(ValueError, match="expected parameters of the task's module, got 1 others"):
            train(Broken(), settings(), show=False)

    def test_devices(self) -> None:
        with pytest.raises(ConfigError, match=r"train.amp: expected 'off' or 'bf16' on a CPU, got 'fp16'"):
            train(Toy(), settings(amp="fp16", device="cpu"), show=False)
        if not torch.cuda.is_available():
            with pytest.raises(ConfigError, match=r"train.device: expected a GPU that torch can use, got none"):
                train(Toy(), settings(device="cuda"), show=False)

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        with pytest.raises(XCosError, match="x: cannot be used as a folder"):
            train(Toy(), settings(), tmp_path / "x", show=False)


@pytest.mark.cuda
def test_fp16_on_a_gpu(tmp_path: Path) -> None:
    result = train(Toy(), settings(amp="fp16", device="cuda", steps=30, checkpoint_every=10), tmp_path, show=False)
    assert math.isfinite(result.loss)
    assert state(tmp_path)[1]["scaler"] is not None


def test_warmup_and_cosine() -> None:
    factors = [warmup_cosine(step, 110, 10, 0.1) for step in range(110)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0 and factors[60] == pytest.approx(0.55)
    assert factors[109] == pytest.approx(0.1, abs=1e-3) and factors == sorted(factors[:10]) + sorted(factors[10:])[::-1]
    assert warmup_cosine(0, 1) == 1.0


def test_the_average_by_hand() -> None:
    module = nn.BatchNorm1d(1)
    average = averaged_model(module, 0.5)
    value = 0.0
    for n in range(4):
        with torch.no_grad():
            module.running_mean.fill_(n + 1.0)
            module.num_batches_tracked.fill_(n + 7)
        average.update_parameters(module)
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0  # the first weights are the first average
        value = decay * value + (1 - decay) * (n + 1.0)
    state = average.module.state_dict()
    assert float(state["running_mean"]) == pytest.approx(value)
    assert int(state["num_batches_tracked"]) == 10
    assert float(module.running_mean) == 4.0


def test_prefetching_keeps_order_and_stays_near() -> None:
    asked: list[int] = []

    def items() -> Any:
        for i in range(50):
            asked.append(i)
            yield i

    made = prefetch(lambda i: i * i, items(), 2)
    assert next(made) == 0 and len(asked) <= 6
    assert list(made) == [i * i for i in range(1, 50)]


def test_settings_may_all_be_set() -> None:
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= set(TrainConfig.FREE)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (3, 8, 8)])
def test_orthogonalised_keeps_directions_and_levels_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = orthogonalised(matrix)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ made @ v.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-9
    assert not orthogonalised(torch.zeros(4, 4)).any()


def test_the_rest_is_adamw_as_torch_has_it() -> None:
    torch.manual_seed(1)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimisers = (
        MuonAdamW(ours.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.1),
        torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.1),
    )
    x, y = torch.randn(20, 5), torch.randn(20, 3)
    for _ in range(10):
        for net, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            (net(x) - y).square().mean().backward()
            optimiser.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_learns_and_refuses_vectors() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(4, 6, 3, bias=False)
    optimiser = MuonAdamW([{"params": [conv.weight], "muon": True}], 0.02)
    x = torch.randn(8, 4, 10, 10)
    wanted = nn.Conv2d(4, 6, 3, bias=False)(x).detach()
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (conv(x) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(ValueError, match="expected matrices or kernels in a group with muon=True, got a vector"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


def test_muon_is_torchs_but_for_its_bfloat16() -> None:
    ours, theirs = (nn.Parameter(torch.randn(12, 30, generator=torch.Generator().manual_seed(1))) for _ in "ab")
    start = ours.detach().clone()
    optimisers = (
        MuonAdamW([{"params": [ours], "muon": True}], 0.02, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon([theirs], 0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        gradient = torch.randn(12, 30, generator=torch.Generator().manual_seed(10 + step))
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
    assert float((ours - theirs).detach().norm() / (ours.detach() - start).norm()) < 0.02


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE: expected a whole number from 1 on, got 'two'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: expected a whole number from 1 on, got '0'"),
        ("RANK", "2", "RANK: expected a whole number from 0 to 1, got '2'"),  # torch would wait for ever
        ("LOCAL_RANK", "-1", "LOCAL_RANK: expected a whole number from 0 on, got '-1'"),
    ],
)
def test_variables_of_torchrun_are_named(name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(XCosError) as error, processes(torch.device("cpu")):
        pass
    assert str(error.value) == expected
