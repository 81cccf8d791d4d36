"""The clock that every comparison uses."""

import time

import pytest

from ejax.timing import interleaved, medians, timed, with_seconds


def test_what_is_compared_takes_turns_after_a_run_that_is_not_timed():
    order, told = [], []
    sleeps = {"a": iter([0.03, 0.02, 0.0, 0.002]), "b": iter([0.03, 0.0, 0.0, 0.0])}

    def run(name):
        order.append(name)
        time.sleep(next(sleeps[name]))

    runs = {name: lambda name=name: run(name) for name in "ab"}
    seconds = interleaved(runs, 3, progress=lambda *turn: told.append(turn))
    assert "".join(order) == "abababab"
    assert told == [(repeat, name) for repeat in (1, 2, 3) for name in "ab"]
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert seconds["a"][0] >= 0.02
    assert 0.002 <= medians(seconds)["a"] < 0.02
    order.clear()
    interleaved({"c": lambda: order.append("c")}, 2, warm_up=False)
    assert order == ["c", "c"]


def test_a_turn_is_as_many_runs_as_fill_its_time():
    runs = []
    seconds = timed(lambda: (time.sleep(0.005), runs.append(0)), at_least=0.03)
    assert 2 <= len(runs) <= 6
    assert seconds * len(runs) >= 0.03
    assert seconds >= 0.005
    assert timed(lambda: runs.clear()) < 1
    assert runs == []


def test_a_run_is_over_when_its_result_is_there():
    class Late:
        def block_until_ready(self):
            time.sleep(0.01)
            return self

    for seconds in (timed(Late), with_seconds(Late)[1], interleaved({0: Late}, 1)[0][0]):
        assert seconds >= 0.01
    assert with_seconds(lambda: "done")[0] == "done"
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0)
