"""Runs take turns, warm-up does not count, and what does not fit in memory is built for each round."""

import weakref

import pytest

from dejavu.bench.timing import interleave, percentiles_ms


class Scene:
    """Two builds, one of two runs; everything that happens is noted."""

    def __init__(self):
        self.events = []

    def builds(self):
        def run(name, seconds):
            return lambda: self.events.append(name) or seconds

        def build(name, runs):
            def make():
                self.events.append(f"build {name}")
                return {key: run(key, seconds) for key, seconds in runs.items()}

            return make

        return [build("one", {"a": [1.0, 2.0], "b": [3.0]}), build("two", {"c": [4.0]})]


def test_runs_take_turns_and_warm_up_does_not_count():
    scene, told = Scene(), []
    times = interleave(scene.builds(), 2, warmup=1, started=told.append)
    assert scene.events == ["build one", "build two", *"abc" * 3]
    assert times == {"a": [1.0, 2.0] * 2, "b": [3.0] * 2, "c": [4.0] * 2}
    assert told == [*"abc" * 3]


def test_without_keeping_each_round_builds_again():
    scene = Scene()
    times = interleave(scene.builds(), 2, warmup=0, keep=False)
    assert scene.events == ["build one", *"ab", "build two", "c"] * 2
    assert times == {"a": [1.0, 2.0] * 2, "b": [3.0] * 2, "c": [4.0] * 2}


def test_without_keeping_only_one_build_lives_at_a_time():
    class Model:
        def __init__(self):
            self.itself = self  # a cycle, as models may have

    alive, most = weakref.WeakSet(), []

    def build():
        model = Model()
        alive.add(model)
        most.append(len(alive))
        return {"run": lambda: [float(model is None)]}

    interleave([build, build], 3, warmup=0, keep=False)
    assert most == [1] * 6


def test_percentiles_are_milliseconds():
    seconds = [i / 1000 for i in range(11)]
    assert percentiles_ms(seconds) == pytest.approx({"p20_ms": 2.0, "p50_ms": 5.0, "p80_ms": 8.0})
