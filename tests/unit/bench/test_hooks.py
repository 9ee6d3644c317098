"""Means over the runs of a round, and that every question has its case."""

from __future__ import annotations

from agent.bpf.manifest import PROGRAMS
from bench.hooks import QUESTIONS, means


def test_a_mean_is_over_the_runs_between_two_looks() -> None:
    assert means({"a": (1000, 10)}, {"a": (3000, 20)}, 10) == {"a": 200.0}


def test_what_ran_by_chance_is_left_out() -> None:
    assert means({"a": (0, 0), "b": (0, 7)}, {"a": (900, 9), "b": (5000, 107)}, 10) == {"b": 50.0}


def test_every_question_is_about_a_program_of_ours() -> None:
    assert {question.program for question in QUESTIONS} <= {program.name for program in PROGRAMS}
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)
