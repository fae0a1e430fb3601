import io
import time

import pytest
from rich.console import Console

from neuralforge.bench import Timing, alternate, ratio_interval, timing_table


def test_candidates_take_turns_forwards_and_backwards():
    calls = []
    found = alternate({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" "cba" "abc" "cba"
    assert {name: (len(t.wall), len(t.cpu)) for name, t in found.items()} == dict.fromkeys("abc", (3, 3))


def test_wall_and_cpu_time_are_told_apart():
    found = alternate({"sleep": lambda: time.sleep(0.05), "work": lambda: sum(range(10**6))}, rounds=3)
    assert found["sleep"].best >= 0.05 > found["sleep"].cpu_median
    assert found["work"].cpu_median > 0


def test_best_median_and_quartiles():
    t = Timing([4.0, 1.0, 2.0, 3.0, 5.0], [1.0, 9.0, 2.0, 8.0, 3.0])
    assert (t.best, t.median, t.quartiles, t.cpu_median) == (1.0, 3.0, (2.0, 4.0), 3.0)
    assert Timing([2.0], [1.0]).quartiles == (2.0, 2.0)


def test_ratio_interval_pairs_the_rounds():
    noise = [1.0, 5.0, 2.0, 9.0, 1.5, 30.0]  # common to both of a pair: a busy machine
    assert ratio_interval([2 * x for x in noise], noise) == (2.0, 2.0, 2.0)
    middle, low, high = ratio_interval([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert middle == 3.0 and 1.0 <= low < 3.0 < high <= 5.0
    with pytest.raises(ValueError):
        ratio_interval([1.0, 2.0], [1.0])


def test_table():
    timings = {"ours": Timing([0.2, 0.1], [0.3, 0.3]), "theirs": Timing([0.4, 0.2], [0.5, 0.5])}
    out = io.StringIO()
    Console(file=out, width=120).print(timing_table(timings, "a step", {"memory": {"theirs": "7 MB"}}))
    rows = {line.split()[1]: line for line in out.getvalue().splitlines() if "│" in line}
    assert "100 " in rows["ours"] and "150 " in rows["ours"] and "300 " in rows["ours"] and "7 MB" not in rows["ours"]
    assert "2.00 (2.00 to 2.00)" in rows["theirs"] and "7 MB" in rows["theirs"]
