"""Results of ``xcos bench``: their file, hostile ones, comparing two, the picture and the tables."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xcos_ext.bench import FormatError, Key, Report, Result, Skipped, compare, read_report
from xcos_ext.io.errors import XCosError

MACHINE = {
    "processor": "A Processor",
    "cores": 2,
    "threads": 1,
    "python": "3.11.7",
    "torch": "2.13.0",
    "commit": "a" * 40,
    "clean": True,
    "date": "2026-01-01T00:00:00+00:00",
}
MODEL = {"name": "small", "fingerprint": "0123456789abcdef", "architecture": "custom", "parameters": 1}


def result(
    stage: str,
    seconds: float,
    *,
    runtime: str = "eager",
    batch: int = 1,
    seed: int = 0,
    wobble: float = 0.01,
    **more: Any,
) -> Result:
    """A case of 12 rounds of 10 calls around ``seconds``."""
    rng = np.random.default_rng([seed, batch, len(stage), len(runtime)])
    speeds = seconds * np.exp(wobble * rng.standard_normal(12))
    rounds = tuple(tuple(float(s * (1 + wobble * rng.random())) for _ in range(10)) for s in speeds)
    device = more.pop("device", "cpu")
    return Result(
        key=Key(stage, runtime, device, "fp32", batch),
        items=batch,
        clock="host",
        rounds=rounds,
        bursts=tuple(float(np.mean(values)) for values in rounds),
        calls=120,
        **more,
    )


def report(results: list[Result] | None = None, seed: int = 0, **more: Any) -> Report:
    if results is None:
        results = [
            result(stage, seconds * batch, runtime=runtime, batch=batch, seed=seed)
            for batch in (1, 16)
            for runtime in ("eager", "onnxruntime")
            for stage, seconds in (("backbone", 4e-3), ("head", 5e-5), ("pair", 8.1e-3))
        ]
    skipped = [Skipped(Key("pair", "tensorrt", "cpu", "fp32", 1), "TensorRT needs a GPU")]
    arguments: dict[str, Any] = {"machine": MACHINE, "conditions": {}, "model": MODEL, "settings": {"cold": False}}
    return Report(**{**arguments, **more}, results=results, skipped=skipped)


def write(folder: Path, data: Any) -> Path:
    file = folder / "results.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


# --- the file


def test_what_is_written_is_read_again(tmp_path):
    first = report()
    text = json.dumps(first.as_dict(), allow_nan=False)
    second = read_report(write(tmp_path, text))
    assert second.as_dict() == first.as_dict()
    assert second.results == first.results and list(second.skipped) == list(first.skipped)


def test_figures_come_from_the_samples_whatever_else_a_file_claims(tmp_path):
    data = report().as_dict()
    data["cases"][0]["latency"]["p50"] = 1e-9
    data["cases"][0]["throughput"] = 1e9
    found = read_report(write(tmp_path, data)).results[0]
    assert found.latency.p50 == pytest.approx(4e-3, rel=0.05)
    assert found.throughput == pytest.approx(250, rel=0.05)


def _damage(*path: Any, value: Any) -> Any:
    def change(data: Any) -> None:
        *way, last = path
        for name in way:
            data = data[name]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_damage("format", value="another"), "expected a file that xcos bench --json wrote"),
        (_damage("schema", value=2), "expected version 1 of the format, got '2'"),
        (_damage("schema", value=True), "expected version 1 of the format, got 'True'"),
        (_damage("machine", value=...), "machine: Field required"),
        (_damage("machine", "threads", value="one"), "machine.threads: Input should be a valid integer"),
        (_damage("machine", "threads", value=10**400), "machine.threads: Input should be less than"),
        (_damage("machine", "gpu", value={}), "machine.gpu.name: Field required"),
        (_damage("model", "fingerprint", value=None), "model.fingerprint: Input should be a valid string"),
        (lambda data: data["cases"].append(data["cases"][0]), "a case is there twice"),
        (_damage("cases", value={}), "cases: Input should be a valid list"),
        (_damage("cases", 0, value=3), "cases.0: Input should be a dictionary"),
        (_damage("cases", 0, "stage", value="lunch"), "stage: expected some of decode, .*got 'lunch'"),
        (_damage("cases", 0, "batch", value=True), "cases.0.batch: Input should be a valid integer"),
        (_damage("cases", 0, "rounds", value=[]), "rounds: expected 1 to 1,000 samples"),
        (_damage("cases", 0, "rounds", value=[[0.1], []]), "at least one a round"),
        (_damage("cases", 0, "rounds", value=[[1.0] * 1001]), "got 1,001"),
        (_damage("cases", 0, "rounds", 0, 0, value=-1), "cases.0.rounds.0.0: Input should be greater than 0"),
        (_damage("cases", 0, "rounds", 0, 0, value="1"), "cases.0.rounds.0.0: Input should be a valid number"),
        (_damage("cases", 0, "rounds", 0, 0, value=10**4000), "cases.0.rounds.0.0: Input should be"),
        (_damage("cases", 0, "calls", value=1), "calls: expected at least 120, got 1"),
        (_damage("cases", 0, "error", value=10**400), "cases.0.error: Input should be"),
        (_damage("cases", 0, "bursts", value=[0]), "cases.0.bursts.0: Input should be greater than 0"),
        (_damage("cases", 0, "items", value=0), "cases.0.items: Input should be greater than or equal to 1"),
        (_damage("skipped", 0, "reason", value=...), "skipped.0.reason: Field required"),
        (_damage("warnings", value=[3]), "warnings.0: Input should be a valid string"),
    ],
)
def test_a_damaged_file_is_one_clear_error(change, message, tmp_path):
    data = copy.deepcopy(report().as_dict())
    change(data)
    file = write(tmp_path, data)
    with pytest.raises(FormatError, match=message) as caught:
        read_report(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[1, 2", "expected JSON"),
        ("[]", "expected a file that xcos bench --json wrote"),
        ('{"format": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_what_is_not_json_is_one_clear_error(text, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read_report(write(tmp_path, text))


def test_files_that_cannot_be_read_are_one_clear_error(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        read_report(tmp_path / "none.json")
    with pytest.raises(FormatError, match="not a regular file"):
        read_report(tmp_path)
    with pytest.raises(FormatError, match="name too long"):
        read_report(tmp_path / ("x" * 300))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"expected JSON, .*utf-8"):
        read_report(tmp_path / "bytes.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "large.json"
    with file.open("wb") as made:
        made.truncate((256 << 20) + 1)  # a hole: it takes no room
    with pytest.raises(FormatError, match="expected at most 256 MiB"):
        read_report(file)


# --- shares


def test_the_heads_share_is_taken_in_the_same_rounds():
    shares = report().shares()
    assert len(shares) == 4
    for share in shares.values():
        assert share.median == pytest.approx(5e-5 / 8.1e-3, rel=0.05)
        assert share.low <= share.median <= share.high
        assert share.under(0.02) and not share.under(0.005)


def test_a_projection_counts_for_both_faces():
    results = [result("projection", 1e-4), result("pair", 1e-2)]
    (share,) = report(results).shares("projection").values()
    assert share.median == pytest.approx(0.02, rel=0.05)


def test_a_busy_machine_does_not_flatter_the_head():
    """Long calls are interrupted there and short ones are not: medians say 1 %, the fastest calls 3 %."""
    quiet, busy = result("pair", 0.01), result("pair", 0.03)
    rounds = (quiet.rounds[0], *busy.rounds[1:])
    (share,) = report([result("head", 3e-4), replace(busy, rounds=rounds)]).shares().values()
    assert share.median < 0.02 < share.of_fastest
    assert not share.under(0.02)


def test_no_share_where_a_half_is_missing():
    assert report([result("pair", 0.01)]).shares() == {}


# --- comparing


def test_a_run_compared_with_another_of_the_same_has_no_changes():
    found = compare(report(seed=1), report(seed=2))
    assert {change.verdict for change in found.changes} == {"same"}
    assert found.warning is None and not found.versions


@pytest.mark.parametrize(("factor", "verdict"), [(1.25, "slower"), (0.75, "faster"), (1.02, "same")])
def test_changes_beyond_noise_are_found_in_either_direction(factor, verdict):
    old, new = report(seed=1), report(seed=2)
    first = new.results[0]
    slower = replace(first, rounds=tuple(tuple(value * factor for value in values) for values in first.rounds))
    found = compare(old, replace(new, results=[slower, *new.results[1:]]))
    verdicts = {change.key: change.verdict for change in found.changes}
    assert verdicts.pop(first.key) == verdict
    assert set(verdicts.values()) == {"same"}
    (change,) = (change for change in found.changes if change.key == first.key)
    assert change.ratio.low < change.ratio.median < change.ratio.high
    assert change.ratio.median == pytest.approx(factor, rel=0.03)


def test_what_noise_could_do_is_unclear():
    old = report([result("pair", 0.01, seed=1, wobble=0.5)])
    new = report([result("pair", 0.012, seed=3, wobble=0.5)])
    assert compare(old, new).changes[0].verdict == "unclear"


def test_medians_that_moved_without_the_fast_calls_are_unclear():
    """Something else was at work during two thirds of the new run."""
    old, new = result("pair", 0.01, seed=1), result("pair", 0.01, seed=2)
    busy = tuple(tuple(2 * v for v in values) if i % 3 else values for i, values in enumerate(new.rounds))
    (change,) = compare(report([old]), report([replace(new, rounds=busy)])).changes
    assert change.ratio.median > 1.9 and change.fast == pytest.approx(1, rel=0.05)
    assert change.verdict == "unclear"


@pytest.mark.parametrize(("old", "new", "text"), [(True, False, "the old run was"), (True, True, "both runs were")])
def test_disturbed_runs_are_warned_about(old, new, text):
    first, second = (report(groups=[{"disturbed": disturbed}]) for disturbed in (old, new))
    warning = compare(first, second).warning
    assert warning is not None and warning.startswith(text)


def test_three_calls_prove_nothing():
    def few(seconds: float) -> Report:
        return report([replace(result("pair", seconds), rounds=((seconds,), (1.01 * seconds,), (0.99 * seconds,)))])

    assert compare(few(0.01), few(0.02)).changes[0].verdict == "unclear"


def test_among_many_equal_cases_none_is_called_changed():
    def many(seed: int) -> Report:
        return report([result("pair", 0.01, batch=n, seed=seed, wobble=0.06) for n in range(1, 41)])

    assert not [c for c in compare(many(1), many(2), minimum=0.0).changes if c.verdict in ("slower", "faster")]


def test_other_machines_and_models_are_compared_with_one_warning():
    old, new = report(seed=1), report(seed=2)
    elsewhere = replace(
        new,
        machine={**MACHINE, "processor": "Another", "threads": 4, "gpu": {"name": "A GPU"}, "commit": "b" * 40},
        model={**MODEL, "fingerprint": "f" * 16},
        settings={"cold": True},
    )
    found = compare(old, elsewhere)
    assert found.warning is not None and found.warning.count("\n") == 0
    for text in (
        "A Processor and Another",
        "threads 1 and 4",
        "GPU none and A GPU",
        "ffff",
        "cold caches False and True",
    ):
        assert text in found.warning
    assert found.versions == ["commit aaaaaaaaaa to bbbbbbbbbb"]


def test_cases_that_only_one_run_has_are_named():
    old, new = (
        report([result("pair", 0.01), result("head", 1e-4)]),
        report([result("pair", 0.01), result("backbone", 1e-3)]),
    )
    found = compare(old, new)
    assert [key.stage for key in found.only_old] == ["head"]
    assert [key.stage for key in found.only_new] == ["backbone"]
    json.dumps(found.as_dict(), allow_nan=False)


def test_runs_without_a_common_case_cannot_be_compared():
    with pytest.raises(XCosError, match="no case in common"):
        compare(report([result("pair", 0.01)]), report([result("head", 0.01)]))


@pytest.mark.parametrize("minimum", [-0.1, 1.0, float("nan")])
def test_the_minimum_is_checked(minimum):
    with pytest.raises(ValueError, match="minimum: expected"):
        compare(report(), report(), minimum=minimum)


# --- picture and tables


def test_the_picture_has_latency_throughput_and_stages():
    pytest.importorskip("matplotlib")
    from xcos_ext.bench.plot import plot_report

    keys = [Key(stage, "native", "cpu", "uint8", 1) for stage in ("decode", "detect", "align")]
    pictures = [replace(result("decode", 0.01), key=key) for key in keys]
    figure = plot_report(report([*report().results, *pictures]))
    latency, throughput, stages = figure.axes
    assert latency.get_yscale() == "log" and throughput.get_ylim()[0] == 0
    labels = [text.get_text() for text in stages.get_yticklabels()]
    assert labels[0].startswith("from photographs") and len(labels) == 5
    shares = [bar.get_width() for container in stages.containers for bar in container]
    assert sum(shares) == pytest.approx(100 * len(labels))


def test_a_run_without_pairs_has_a_smaller_picture_and_one_of_searches_none():
    pytest.importorskip("matplotlib")
    from xcos_ext.bench.plot import plot_report

    assert len(plot_report(report([result("backbone", 0.01)])).axes) == 2
    search = replace(result("pair", 0.01), key=Key("search", "native", "cpu", "fp32", 1))
    with pytest.raises(ValueError, match="expected cases of pair"):
        plot_report(report([search]))


@pytest.fixture
def tables() -> Iterator[Any]:
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import bench_table

        yield bench_table
    finally:
        sys.path.remove(folder)


def test_tables_are_rendered_from_a_results_file(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert {tables.table(kind) for kind in ("short", "all", "shares", "gpu")} == {tables.PENDING}
    (tmp_path / "cpu.json").write_text(json.dumps(report().as_dict()))
    short = tables.table("short")
    assert "| onnxruntime | fp32 | 8." in short and "1 pair a call | 16 pairs a call" in short
    assert "0.62" in tables.table("shares") and "met" in tables.table("shares")
    assert "TensorRT needs a GPU" in tables.table("all")
    assert tables.table("gpu") == tables.PENDING
    for kind in ("short", "shares"):
        rows = [line for line in tables.table(kind).splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1
