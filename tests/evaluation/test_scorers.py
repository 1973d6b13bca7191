"""Golden cases, worked out by hand from the benchmark's rules (VQA evaluation server, GT-Vision-Lab/VQA)."""

from __future__ import annotations

import pytest

from scale_digrap.evaluation.scorers import exact_match, normalize, scorer, vqa_accuracy


def ten(*counts: tuple[str, int]) -> list[str]:
    answers = [answer for answer, count in counts for _ in range(count)]
    assert len(answers) == 10
    return answers


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Yes.", "yes"),
        ("  A  Dog \n", "dog"),
        ("the an a", ""),
        ("Two", "2"),
        ("none", "0"),
        ("TEN cats", "10 cats"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("DONT know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("its", "its"),  # not a contraction in the benchmark's table
        ("somebody'd", "somebodyd"),  # the table's own mistake, kept
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("red, white", "red white"),  # the comma touches a space: removed
        ("red,white", "red white"),  # it does not: a space
        ("1,000", "1000"),  # between digits: removed
        ("1,000 t-shirts", "1000 tshirts"),  # ... together with all other punctuation of the text
        ("t-shirt", "t shirt"),
        ("black & white", "black & white"),  # not in the list
        ("9:30", "9:30"),
        ("what?!", "what"),
        ("(left)", "left"),
        ("left\tside", "left side"),
    ],
)
def test_normalisation(raw: str, normal: str):
    assert normalize(raw) == normal


def test_more_than_32_periods_are_all_removed():
    """Ports pass re.UNICODE (32) where `re.sub` takes a count."""
    assert normalize("a." * 40) == "a" * 40


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_leave_one_out_over_ten_annotators(matches: int, score: float):
    answers = ten(("dog", matches), ("cat", 10 - matches))
    assert vqa_accuracy("dog", answers) == pytest.approx(score, abs=1e-12)
    assert vqa_accuracy("dog", answers, "lavis") == pytest.approx(score, abs=1e-12)


def test_unanimous_annotators():
    answers = ten(("Yes", 10))
    # official: nothing is normalised, so the case must agree; lavis: the prediction is normalised, the answers are not
    assert vqa_accuracy("Yes", answers, "official") == 1.0
    assert vqa_accuracy("yes", answers, "official") == 0.0
    assert vqa_accuracy("yes", answers, "lavis") == 1.0 - 1.0  # "yes" ≠ "Yes": lavis leaves the answers' case alone
    assert vqa_accuracy("Yes.", ten(("yes", 10)), "lavis") == 1.0
    assert vqa_accuracy("Yes.", ten(("yes", 10)), "official") == 0.0


def test_variants_differ_on_number_words_and_articles_of_annotators():
    answers = ten(("two", 5), ("2", 1), ("the 2", 4))
    assert vqa_accuracy("two", answers, "official") == 1.0
    assert vqa_accuracy("two", answers, "lavis") == pytest.approx(0.3)  # only the one annotator who wrote "2"


def test_white_space_around_answers_is_no_disagreement():
    assert vqa_accuracy("a dog", ten(("a dog", 5), (" a dog\n", 5)), "official") == 1.0
    assert vqa_accuracy("dog", ten(("a dog", 5), (" a dog\n", 5)), "official") == 0.0


@pytest.mark.parametrize("variant", ["official", "lavis"])
def test_one_answer_is_an_exact_match_after_normalisation(variant: str):
    """Leave-one-out leaves nothing to compare with: ports score every such question 0."""
    assert vqa_accuracy("Two.", ["2"], variant) == 1.0
    assert vqa_accuracy("A Rectangle", ["rectangle"], variant) == 1.0
    assert vqa_accuracy("circle", ["rectangle"], variant) == 0.0
    assert vqa_accuracy("", ["rectangle"], variant) == 0.0


def test_fewer_than_four_annotators_can_still_give_a_full_score():
    assert vqa_accuracy("dog", ["dog", "dog"]) == 1.0
    assert vqa_accuracy("dog", ["dog", "dog", "dog"]) == 1.0
    assert vqa_accuracy("dog", ["dog", "cat"]) == pytest.approx(0.5)


def test_refusals():
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("x", [])
    with pytest.raises(ValueError, match="without answers"):
        exact_match("x", [])
    with pytest.raises(ValueError, match=r"'officiel'.*official, lavis"):
        vqa_accuracy("x", ["x"], "officiel")
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        scorer("bleu")


def test_scorers_by_name():
    answers = ten(("two", 5), ("2", 1), ("the 2", 4))
    assert scorer("vqa/official")("two", answers) == 1.0
    assert scorer("vqa/lavis")("two", answers) == pytest.approx(0.3)
    assert scorer("exact")("the cat.", ["dog", "cat"]) == 1.0
    assert scorer("exact")("bird", ["dog", "cat"]) == 0.0
