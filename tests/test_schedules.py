"""Schedules by hand numbers: 100 steps, so that a fraction is a percentage."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from hf_prune import PruningError, Schedule, register_schedule
from hf_prune.schedules import SCHEDULES


@pytest.mark.parametrize(
    ("kind", "halfway", "at_a_fifth"),
    [
        ("linear", 0.5, 0.2),
        ("cubic", 0.875, 0.488),
        ("polynomial", 0.875, 0.488),
        ("cosine", 0.5, 0.0954915),
        ("exponential", 1 / (1 + math.exp(-1.5)), 0.4748287),
        ("oneshot", 1.0, 1.0),
        ("constant", 1.0, 1.0),
    ],
)
def test_fraction_by_hand(kind, halfway, at_a_fifth):
    """1 - 0.5^3 = 0.875, 1 - 0.8^3 = 0.488; (1 - e^-1.5)/(1 - e^-3), (1 - e^-0.6)/(1 - e^-3); (1 - cos 36 deg)/2."""
    schedule = Schedule(kind, begin=0.1, end=0.6)
    assert schedule.fraction(35, 100) == pytest.approx(halfway)
    assert schedule.fraction(20, 100) == pytest.approx(at_a_fifth)


@pytest.mark.parametrize("kind", ["linear", "cubic", "polynomial", "cosine", "exponential"])
def test_fraction_at_the_edges(kind):
    schedule = Schedule(kind, begin=0.1, end=0.6)
    assert [schedule.fraction(step, 100) for step in (1, 9, 10, 60, 61, 100)] == [0, 0, 0, 1, 1, 1]


def test_initial_is_where_it_starts():
    schedule = Schedule("linear", begin=10, end=20, initial=0.4)
    assert [schedule.fraction(step, 100) for step in (9, 10, 15, 20)] == pytest.approx([0.0, 0.4, 0.7, 1.0])


@pytest.mark.parametrize(
    ("begin", "end", "bounds"),
    [
        (0.1, 0.7, (10, 70)),
        (10, 70, (10, 70)),
        (0.0, 1.0, (1, 100)),
        (0, 100, (1, 100)),
        (1, 1, (1, 1)),
        (1.0, 1.0, (100, 100)),
        (0.25, 50, (25, 50)),
    ],
)
def test_floats_are_fractions_and_ints_are_steps(begin, end, bounds):
    assert Schedule(begin=begin, end=end).bounds(100) == bounds


def test_changes_come_at_the_frequency_and_at_the_end():
    assert Schedule(begin=0.0, end=0.5, frequency=20).change_steps(100) == [1, 21, 41, 50]
    assert Schedule(begin=10, end=30, frequency=10).change_steps(100) == [10, 20, 30]
    assert Schedule(begin=5, end=5).change_steps(100) == [5]
    assert Schedule("oneshot", begin=0.3, end=0.9).change_steps(100) == [30]


def test_the_last_change_reaches_the_end():
    schedule = Schedule(begin=0.05, end=0.83, frequency=7)
    assert schedule.fraction(schedule.change_steps(100)[-1], 100) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin": 1.5}, r"schedule.begin as a float is a fraction of all steps in \[0, 1\]. Received: 1.5"),
        ({"end": 101}, "schedule.end must be within the 100 steps of this run. Received: 101"),
        ({"begin": 0.8, "end": 0.2}, "schedule.begin must not be after schedule.end. Received: 0.8 and 0.2"),
        ({"begin": 50, "end": 0.2}, "Received: 50 and 0.2"),
        ({"steps": [(50, 0.5), (0.2, 1)]}, r"schedule.steps must come one after the other. Received: \[50, 20\]"),
        ({"steps": [(500, 1)]}, "schedule.steps must be within the 100 steps of this run. Received: 500"),
        ({"kind": "cubik"}, "No schedule is named 'cubik'. Did you mean 'cubic'"),
    ],
)
def test_what_does_not_fit_the_run(settings, message):
    with pytest.raises(PruningError, match=message):
        Schedule(**settings).change_steps(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frequency": 0}, "Schedule: frequency: .*greater than or equal to 1. Received: 0"),
        ({"frequency": "0 steps"}, "Schedule: frequency: .*greater than or equal to 1. Received: 0"),
        ({"begin": "2.5 steps"}, "Schedule: begin: steps must be whole. Received: '2.5 steps'"),
        ({"begin": True}, "Schedule: begin: .*'2 epochs'.* Received: True"),
        ({"power": 0}, "Schedule: power: .*greater than 0. Received: 0"),
        ({"steps": [(5, 0.5)]}, "the last of the steps must reach a fraction of 1. Received: 0.5"),
        ({"steps": [(5, 1)], "kind": "linear"}, "steps stand alone: without kind"),
        ({"begin": -0.1}, "Schedule: begin.* Received: -0.1"),
        ({"initial": 1.0}, "Schedule: initial: .*less than 1. Received: 1.0"),
        ({"begins": 0.1}, "unknown key 'begins'. Did you mean 'begin'"),
        ({"end": "late"}, "Schedule: end.*Received: 'late'"),
    ],
)
def test_what_does_not_fit_at_all(settings, message):
    with pytest.raises(PruningError, match=message):
        Schedule(**settings)


def test_settings_print_and_compare():
    assert Schedule(begin=5) == Schedule(begin=5) != Schedule(begin=6)
    assert "begin=5" in repr(Schedule(begin=5))


def test_own_schedule_is_one_function():
    @register_schedule("square_root_of_progress")
    def square_root(progress: float) -> float:
        return progress**0.5

    try:
        assert Schedule("square_root_of_progress", begin=0, end=100).fraction(26, 100) == pytest.approx(
            (25 / 99) ** 0.5
        )
    finally:
        del SCHEDULES._entries["square_root_of_progress"]


def test_an_exponential_schedule_shrinks_what_is_left_by_one_factor():
    schedule = Schedule("exponential", begin=1, end=4, power=-math.log(1 - 0.875))
    left = [1 - 0.875 * schedule.fraction(step, 4) for step in (1, 2, 3, 4)]
    assert left == pytest.approx([1, 0.5, 0.25, 0.125])
    assert Schedule("polynomial", begin=1, end=101, power=2).fraction(51, 101) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("30 steps", 30), ("30", 30), ("1 step", 1), ("25 %", 0.25), ("0.25", 0.25), ("2 epochs", "2 epochs")],
)
def test_a_moment_can_be_spelled(text, meaning):
    assert Schedule(begin=text).begin == meaning


def test_epochs_become_steps_where_one_knows_how_many():
    schedule = Schedule("linear", begin="0.5 epochs", end="3 epochs", frequency="1 epoch")
    assert schedule.in_steps(10) == Schedule("linear", begin=5, end=30, frequency=10)
    assert schedule.in_steps(10).change_steps(40) == [5, 15, 25, 30]
    assert Schedule(frequency="0.01 epochs").in_steps(10).frequency == 1
    assert Schedule(steps=[("1 epochs", 0.5), ("2 epochs", 1)]).in_steps(10).change_steps(40) == [10, 20]
    with pytest.raises(PruningError, match=r"schedule.begin in epochs needs .*epoch_steps.* Received: '0.5 epochs'"):
        schedule.change_steps(40)


def test_a_frequency_may_be_a_fraction_of_the_run():
    assert Schedule(begin=0.0, end=0.5, frequency=0.2).change_steps(100) == [1, 21, 41, 50]
    assert Schedule(begin=10, end=30, frequency=500).change_steps(100) == [10, 30]


def test_changes_by_hand():
    schedule = Schedule(steps=[(10, 0.5), ("40 %", 0.0), (0.6, 1.0)])
    assert schedule.change_steps(100) == [10, 40, 60]
    assert [schedule.fraction(step, 100) for step in (9, 10, 39, 40, 59, 60, 100)] == [0, 0.5, 0.5, 0, 0, 1, 1]
    assert schedule.bounds(100) == (10, 60)
    assert schedule.progress(35, 100) == 0.5


def test_a_constant_schedule_changes_at_the_same_sparsity():
    schedule = Schedule("constant", begin=10, end=40, frequency=10)
    assert schedule.change_steps(100) == [10, 20, 30, 40]
    assert {schedule.fraction(step, 100) for step in (10, 20, 30, 40)} == {1}
    assert [schedule.progress(step, 100) for step in (5, 10, 25, 40, 90)] == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("total_steps", [12, 40, 100, 2000])
def test_a_short_run_has_ten_changes_where_it_can(total_steps):
    steps = Schedule().change_steps(total_steps)
    begin, end = Schedule().bounds(total_steps)
    assert (steps[0], steps[-1]) == (begin, end)
    assert len(steps) >= min(10, end - begin + 1)
    assert max(after - before for before, after in pairwise(steps)) <= 50


def test_a_long_run_changes_every_fifty_steps():
    assert Schedule().change_steps(1000) == [*range(100, 700, 50), 700]


@pytest.mark.parametrize(
    ("schedule", "total_steps", "warns"),
    [
        (Schedule(frequency=50), 40, True),  # steps 4 and 28: all leaves at the second
        (Schedule(frequency=50), 100, True),
        (Schedule(), 40, False),
        (Schedule("oneshot", begin=1, end=1), 1, False),
        (Schedule("constant"), 40, False),
        (Schedule(steps=[(4, 1)]), 40, False),
        (Schedule(begin=1, end=3, frequency=1), 8, True),
    ],
)
def test_too_few_changes_are_said(schedule, total_steps, warns, caplog):
    schedule.warn_of_few(total_steps)
    assert [f"of {total_steps} only" in one.getMessage() for one in caplog.records] == [True] * warns
