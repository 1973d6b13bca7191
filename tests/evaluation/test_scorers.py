"""Golden cases, worked out by hand from the benchmark's rules (VQA evaluation server, GT-Vision-Lab/VQA)."""

from __future__ import annotations

import random

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
    assert vqa_accuracy("yes", answers, "lavis") == 0.0  # "yes" ≠ "Yes": lavis leaves the answers' case alone
    assert vqa_accuracy("Yes.", ten(("yes", 10)), "lavis") == 1.0
    assert vqa_accuracy("Yes.", ten(("yes", 10)), "official") == 0.0


def test_variants_differ_on_number_words_and_articles_of_annotators():
    answers = ten(("two", 5), ("2", 1), ("the 2", 4))
    assert vqa_accuracy("two", answers, "official") == 1.0
    assert vqa_accuracy("two", answers, "lavis") == pytest.approx(0.3)  # only the one annotator who wrote "2"


def test_white_space_around_answers_is_no_disagreement():
    assert vqa_accuracy("a dog", ten(("a dog", 5), (" a dog\n", 5)), "official") == 1.0
    assert vqa_accuracy("dog", ten(("a dog", 5), (" a dog\n", 5)), "official") == 0.0


def test_lavis_takes_answers_as_they_are():
    # A line break at the end of one answer is a disagreement to lavis, and stays there.
    assert vqa_accuracy("dog", [*ten(("dog", 10))[:-1], "dog\n"], "lavis") == pytest.approx((9 + 1) / 10)
    assert vqa_accuracy("dog", ten(("dog\n", 10)), "lavis") == 0.0
    assert vqa_accuracy("dog", ten(("dog\n", 10)), "official") == 1.0
    # Words of the answers are never changed, their punctuation only where annotators disagree.
    assert vqa_accuracy("T-shirt.", ten(("t-shirt", 10)), "lavis") == 0.0
    assert vqa_accuracy("T-shirt.", ten(("t-shirt", 9), ("shirt", 1)), "lavis") == 1.0
    assert vqa_accuracy("the dog", ten(("a dog", 9), ("dog", 1)), "lavis") == pytest.approx(0.3)
    assert vqa_accuracy("the dog", ten(("a dog", 9), ("dog", 1)), "official") == 1.0


# A second implementation, literal and slow, of the same published rules: it builds every set of nine annotators, and
# walks over characters instead of using regular expressions.
APOSTROPHES = {
    "dont": "don't", "isnt": "isn't", "couldntve": "couldntve", "couldnt've": "couldn't've", "oclock": "o'clock",
    "yall": "y'all", "thats": "that's", "whos": "who's", "theyll": "they'll", "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at", "twas": "'twas", "shed": "shed", "well": "well", "its": "its", "maam": "ma'am",
}  # fmt: skip
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "nine": "9", "ten": "10", "eleven": "eleven"}


def literal_punctuation(text: str) -> str:
    comma = any(
        text[i].isdecimal() and text[i + 1] == "," and text[i + 2].isdecimal() for i in range(max(0, len(text) - 2))
    )
    marks = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
    out = text
    for mark in marks:
        touches = any(text[i : i + 2] in (mark + " ", " " + mark) for i in range(len(text)))
        out = "".join((("" if touches or comma else " ") if letter == mark else letter) for letter in out)
    kept = []
    for i, letter in enumerate(out):
        if letter == "." and not (i + 1 < len(out) and out[i + 1].isdecimal()):
            continue
        kept.append(letter)
    return "".join(kept)


def literal_words(text: str) -> str:
    words = []
    for word in text.lower().split():
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(APOSTROPHES.get(word, word))
    return " ".join(words)


def literal_accuracy(prediction: str, answers: list[str], variant: str) -> float:
    tidy = lambda text: text.replace("\n", " ").replace("\t", " ").strip()  # noqa: E731
    prediction = tidy(prediction)
    if variant == "official":
        answers = [tidy(answer) for answer in answers]
    differ = any(answer != answers[0] for answer in answers)
    if variant == "lavis" or differ:
        prediction = literal_words(literal_punctuation(prediction))
    if differ:
        answers = [literal_punctuation(answer) for answer in answers]
        if variant == "official":
            answers = [literal_words(answer) for answer in answers]
    scores = []
    for left_out in range(len(answers)):
        others = [answer for number, answer in enumerate(answers) if number != left_out]
        scores.append(min(1.0, sum(answer == prediction for answer in others) / 3))
    return sum(scores) / len(scores)


def test_a_literal_second_implementation_agrees_on_random_cases():
    rng = random.Random(0)
    words = [
        *APOSTROPHES,
        *DIGITS,
        "the",
        "a",
        "An",
        "Dog",
        "dog",
        "cat",
        "YES",
        "yes",
        "no",
        "red",
        "t-shirt",
        "u.s.a.",
    ]
    words += ["1,000", "3.5", ".5", "5.", "9:30", "black&white", "(left)", "what?!", "and/or", "a_b", "`x`", '"q"', "ü"]
    joints = [" ", " ", " ", "  ", ", ", ",", " - ", "-", "/", ". ", ".", "\n", "\t", "? ", "!", "; "]

    def phrase() -> str:
        text = rng.choice(words)
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
            text += rng.choice(joints) + rng.choice(words)
        return rng.choice(["", "", "", " ", "\n"]) + text + rng.choice(["", "", "", ".", " ", "?"])

    scored = {"official": set(), "lavis": set()}
    different = 0
    for _ in range(2000):
        pool = [phrase() for _ in range(rng.choice([1, 2, 2, 3, 5]))]
        pool += [pool[0].upper(), pool[0] + ".", "the " + pool[0]] if rng.random() < 0.5 else []
        answers = [rng.choice(pool) for _ in range(10)]
        prediction = rng.choice([*answers, phrase(), pool[0].lower(), "a " + pool[0]])
        results = {}
        for variant, seen in scored.items():
            results[variant] = vqa_accuracy(prediction, answers, variant)
            assert results[variant] == pytest.approx(literal_accuracy(prediction, answers, variant), abs=1e-12), (
                variant,
                prediction,
                answers,
            )
            seen.add(round(results[variant], 6))
        different += results["official"] != results["lavis"]
    assert scored["official"] == scored["lavis"] == {0.0, 0.3, 0.6, 0.9, 1.0}
    assert different > 200


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


def test_top1_is_the_name_of_the_class_and_nothing_more():
    top1 = scorer("top1")
    assert top1("Aircraft carrier.", ["aircraft carrier"]) == 1.0
    assert top1("aircraft_carrier", ["aircraft carrier"]) == 1.0
    assert top1("the Eiffel Tower", ["The Eiffel Tower"]) == 1.0
    assert top1("an aircraft carrier at sea", ["aircraft carrier"]) == 0.0
    assert top1("aircraft", ["aircraft carrier"]) == 0.0
    assert top1("sofa", ["couch", "sofa"]) == 1.0
    assert top1("", ["couch"]) == 0.0
