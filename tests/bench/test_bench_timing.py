"""The clock, the turns and the caches of ``xcos bench``, with functions whose time is known."""

from __future__ import annotations

import gc
import itertools
import time

import pytest

from xcos_ext.bench import machine as describe
from xcos_ext.bench.environment import ColdCache, Watch, busy_warning, conditions
from xcos_ext.deploy.timing import Clock, Contender, DeviceClock, measure_in_turns


class Stopwatch(Clock):
    """A clock for which time passes only in calls."""

    name = "stopwatch"

    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self, call, calls):
        start = self.now
        for _ in range(calls):
            call()
        return self.now - start


def test_the_host_clock_measures_sleep():
    clock = Clock()
    taken = clock.each(lambda: time.sleep(0.004), 5, None)
    assert len(taken) == 5
    assert all(0.004 <= seconds < 0.1 for seconds in taken)
    assert 0.004 <= clock.together(lambda: time.sleep(0.004), 3) < 0.1


def test_flushing_is_not_timed():
    taken = Clock().each(lambda: None, 3, lambda: time.sleep(0.01))
    assert max(taken) < 0.005


@pytest.mark.thorough
def test_contenders_take_turns_and_get_the_same_rounds():
    order: list[str] = []
    contenders = [
        Contender(lambda name=name, pause=pause: (order.append(name), time.sleep(pause)), Clock())
        for name, pause in (("short", 0.0005), ("long", 0.003))
    ]
    first, second = measure_in_turns(contenders, 0.1)
    assert len(first.rounds) == len(second.rounds) >= 7
    assert len(first.bursts) == len(first.rounds)
    assert first.calls > second.calls
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= 2 * len(first.rounds) - 1
    assert sorted(first.rounds[0])[0] >= 0.0005
    assert first.failure is None and first.warm_calls >= 2


@pytest.mark.thorough
def test_a_steady_call_ends_its_warm_up_early():
    clock = Stopwatch()

    def call() -> None:
        clock.now += 0.001

    (found,) = measure_in_turns([Contender(call, clock)], 0.05)
    assert found.steady
    assert [value for values in found.rounds for value in values] == pytest.approx([0.001] * found.calls)


@pytest.mark.thorough
def test_the_call_after_another_contender_is_not_timed():
    clock = Stopwatch()
    last = ""

    def contender(name: str) -> Contender:
        def call() -> None:
            nonlocal last
            clock.now += 0.001 if last == name else 0.1  # cold after the other one
            last = name

        return Contender(call, clock)

    for found in measure_in_turns([contender("a"), contender("b")], 0.05):
        assert max(seconds for values in found.rounds for seconds in values) == pytest.approx(0.001)


@pytest.mark.thorough
def test_one_that_fails_is_left_out_with_its_reason_and_the_others_go_on():
    calls = 0

    def later() -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise RuntimeError("out of luck")

    def at_once() -> None:
        raise MemoryError

    clock = Clock()
    good, bad, worse = measure_in_turns(
        [
            Contender(lambda: time.sleep(0.0005), clock),
            Contender(later, clock),
            Contender(at_once, clock),
        ],
        0.05,
    )
    assert good.failure is None and good.rounds
    assert repr(bad.failure) == "RuntimeError('out of luck')"
    assert isinstance(worse.failure, MemoryError) and not worse.rounds


@pytest.mark.thorough
def test_a_call_longer_than_the_budget_gets_three_rounds():
    (found,) = measure_in_turns([Contender(lambda: time.sleep(0.03), Clock())], 0.02)
    assert len(found.rounds) == 3 and found.calls == 3


@pytest.mark.thorough
def test_blocks_of_calls_are_one_figure_a_round_and_everyone_gets_as_many():
    calls = (lambda: None, lambda: sum(range(100)), lambda: 1 / 0)
    quick, longer, failed = measure_in_turns([Contender(c, Clock()) for c in calls], 0.0, one_by_one=False, least=5)
    assert len(quick.bursts) == len(longer.bursts) == 5 and not quick.rounds
    assert isinstance(failed.failure, ZeroDivisionError) and not failed.bursts
    (found,) = measure_in_turns([Contender(calls[1], Clock())], 0.05, one_by_one=False)
    assert len(found.bursts) >= 7 and 0 < min(found.bursts) < 1e-3


@pytest.mark.thorough
def test_cold_caches_flush_before_every_call_and_give_no_bursts():
    log: list[str] = []
    (found,) = measure_in_turns([Contender(lambda: log.append("call"), Clock(), lambda: log.append("flush"))], 0.02)
    timed = log[-2 * found.calls :]
    assert timed == ["flush", "call"] * found.calls
    assert not found.bursts


@pytest.mark.thorough
def test_progress_only_grows_and_ends_at_one():
    shares: list[float] = []
    measure_in_turns([Contender(lambda: time.sleep(0.001), Clock())], 0.05, tick=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.thorough
def test_garbage_collection_is_off_meanwhile_and_on_again_afterwards():
    seen: set[bool] = set()
    measure_in_turns([Contender(lambda: seen.add(gc.isenabled()), Clock())], 0.01)
    assert seen == {False}
    assert gc.isenabled()


@pytest.mark.thorough
def test_ctrl_c_is_passed_on():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_in_turns([Contender(interrupted, Clock())], 0.01)
    assert gc.isenabled()


def test_the_flushed_buffer_is_larger_than_the_cache_and_says_when_it_is_not(monkeypatch):
    monkeypatch.setattr("xcos_ext.bench.environment._cache_bytes", lambda: 1 << 20)
    cache = ColdCache("cpu")
    assert cache.bytes == 5 << 18 and cache.whole
    cache()
    monkeypatch.setattr("xcos_ext.bench.environment._available_memory", lambda: 1 << 20)
    assert not ColdCache("cpu").whole


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.log.append("record")
        self.at = self.cuda.now

    def synchronize(self) -> None:
        self.cuda.log.append("event")

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


class FakeCuda:
    """Stands in for torch.cuda; time in milliseconds passes in calls."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.log.append("idle")


def test_the_device_clock_synchronises_around_each_call_and_around_many():
    clock = DeviceClock()
    clock._cuda = cuda = FakeCuda()

    def call() -> None:
        cuda.log.append("call")
        cuda.now += 2.0

    def flush() -> None:
        cuda.log.append("flush")
        cuda.now += 50.0

    assert clock.each(call, 2, flush) == [pytest.approx(0.002)] * 2
    assert cuda.log == ["flush", "idle", "record", "call", "record", "event"] * 2
    cuda.log.clear()
    assert clock.together(call, 4) == pytest.approx(0.002)
    assert cuda.log == ["idle", "record", *["call"] * 4, "record", "event"]


def test_the_machine_is_described_with_the_commit_of_a_checkout_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XCOS_COMMIT", "from the environment")
    info = describe(tmp_path)
    assert info["commit"] == "from the environment" and info["clean"] is False
    assert {"processor", "cores", "threads", "python", "torch", "build", "date"} <= set(info)
    assert info["threads"] >= 1 and info["processor"]


def test_conditions_are_numbers_or_none():
    found = conditions()
    assert found["load"] is None or found["load"] >= 0
    assert found["mhz"] is None or found["mhz"][0] <= found["mhz"][1]


def test_clocks_that_are_no_numbers_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr("xcos_ext.bench.environment._CPU", tmp_path)
    monkeypatch.setattr("xcos_ext.bench.environment._cpuinfo", lambda name: ["Unknown", ""])
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("<unknown>")
    assert conditions()["mhz"] is None


@pytest.mark.parametrize(("load", "warned"), [(None, False), (0.1, False), (1.0, True), (7.5, True)])
def test_a_busy_machine_is_warned_about(load, warned, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert (busy_warning({"load": load}) is not None) == warned


@pytest.mark.parametrize(
    ("others", "seconds", "warned"), [(None, 5, False), (0.1, 5, False), (0.9, 5, True), (0.9, 0.1, False)]
)
def test_others_at_work_are_warned_about(others, seconds, warned, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert (Watch.warning({"others": others, "seconds": seconds}) is not None) == warned


def test_a_watch_counts_this_process_as_itself():
    watch = Watch()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.2:
        pass
    found = watch.read()
    assert 0.2 <= found["seconds"] < 5
    assert found["others"] is None or found["others"] >= 0
