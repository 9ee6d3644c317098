"""Our text is what prometheus_client would have written."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from agent import exposition

NAMES = ("a", "b")
VALUES = st.tuples(*[st.text('x%\\"\n{},= é', max_size=4)] * 2)
SAMPLES = st.dictionaries(VALUES, st.integers(0, 2**64 - 1), max_size=6)


class One:
    """A collector of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def theirs(metric: Metric) -> list[str]:
    registry = CollectorRegistry()
    registry.register(One(metric))
    return [line.rpartition(" ")[0] if not line.startswith("#") else line for line in generate_latest(registry).decode().split("\n")]


def ours(text: str) -> list[str]:
    return [line.rpartition(" ")[0] if not line.startswith("#") else line for line in text.split("\n")]


@given(SAMPLES)
def test_counters_and_gauges(samples: dict[tuple[str, str], int]) -> None:
    texts = {exposition.labels(NAMES, values): number for values, number in samples.items()}
    counter, gauge = CounterMetricFamily("n", "What.", labels=NAMES), GaugeMetricFamily("n", "What.", labels=NAMES)
    for values, number in samples.items():
        counter.add_metric(values, number)
        gauge.add_metric(values, number)
    assert ours("".join(exposition.counter("n", "What.", texts))) == theirs(counter)
    assert ours("".join(exposition.gauge("n", "What.", texts))) == theirs(gauge)
    numbers = [line.rpartition(" ")[2] for line in "".join(exposition.gauge("n", "What.", texts)).splitlines() if line[0] != "#"]
    assert numbers == [str(number) for number in samples.values()], "64 bits, not what a float keeps of them"


@settings(deadline=None)  # the reference is slow
@given(st.dictionaries(VALUES, st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), max_size=120))
def test_histograms(samples: dict[tuple[str, str], list[int]]) -> None:
    bounds = ("0.5", "1.5", "+Inf")
    family = HistogramMetricFamily("n", "What.", labels=NAMES)
    for values, (one, two, three) in samples.items():
        family.add_metric(values, [("0.5", one), ("1.5", one + two), ("+Inf", one + two + three)], 2.5)
    found = exposition.Histogram("n", "What.", bounds).text((exposition.labels(NAMES, v), slots, 2.5) for v, slots in samples.items())
    assert sorted(ours("".join(found))) == sorted(theirs(family))
