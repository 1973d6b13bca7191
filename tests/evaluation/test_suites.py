from __future__ import annotations

import pytest

from scale_digrap.evaluation.registry import QUICKSTART
from scale_digrap.evaluation.suites import Suite, SuiteRegistry, averages

SUITES = list(QUICKSTART.values())
SCORES = {"id": 0.9, "vision": 0.8, "question": 0.6, "answer": 0.4, "multimodal": 0.2, "far": 0.1}


def test_quickstart_suites_and_their_groups():
    assert list(QUICKSTART) == ["id", "vision", "question", "answer", "multimodal", "far"]
    assert [suite.group for suite in SUITES] == ["id", "near", "near", "near", "near", "far"]


def test_every_suite_weighs_the_same():
    result = averages(SCORES, SUITES)
    assert result["near"] == pytest.approx(2.0 / 4)
    assert result["far"] == pytest.approx(0.1)
    assert result["ood"] == pytest.approx(2.1 / 5)
    assert result["all"] == pytest.approx(3.0 / 6)


@pytest.mark.parametrize("absent", ["absent", "none"])
def test_a_missing_suite_leaves_its_averages_empty(absent: str):
    scores = dict(SCORES)
    if absent == "none":
        scores["answer"] = None
    else:
        del scores["answer"]
    result = averages(scores, SUITES)
    assert result["near"] is None
    assert result["ood"] is None
    assert result["all"] is None
    assert result["far"] == pytest.approx(0.1)


def test_a_group_without_suites_has_no_average():
    near_only = [suite for suite in SUITES if suite.group == "near"]
    result = averages({name: SCORES[name] for name in ("vision", "question", "answer", "multimodal")}, near_only)
    assert result["far"] is None
    assert result["near"] == pytest.approx(0.5)


def test_scores_of_unknown_suites_are_refused():
    with pytest.raises(ValueError, match=r"unknown suites \['visoin'\]"):
        averages({"visoin": 0.5}, SUITES)


def test_registry():
    registry = SuiteRegistry()
    registry.register(Suite(name="gqa", group="id", shift="none", metric="exact"))
    with pytest.raises(ValueError, match="registered already"):
        registry.register(Suite(name="gqa", group="far", shift="skill"))
    with pytest.raises(KeyError, match="there are: gqa"):
        registry["gqq"]


def test_a_suite_states_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="group must be one of id, near, far, got 'medium'"):
        Suite(name="x", group="medium", shift="vision")
    with pytest.raises(ValueError, match="goes with shift 'none'"):
        Suite(name="x", group="id", shift="vision")
    with pytest.raises(ValueError, match="unknown metric"):
        Suite(name="x", group="far", shift="skill", metric="bleu")


def test_shards_are_attached_to_a_copy():
    suite = QUICKSTART["far"].at("far-{000..003}.tar")
    assert suite.shards == ("far-{000..003}.tar",)
    assert QUICKSTART["far"].shards == ()
