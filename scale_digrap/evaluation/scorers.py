"""How a generated answer is scored.

The metric of VQAv2 and its relatives is the consensus accuracy of Antol et al. (ICCV 2015): an answer is worth
min(1, n / 3), where n annotators gave it, averaged over all ways of leaving one of the ten annotators out. Two
versions of its text normalisation are in circulation and differ on many questions, so a result names the one it used:

``official``
    GT-Vision-Lab/VQA in its newest form: prediction and answers are normalised fully, and only where the annotators
    disagree. Where they are unanimous the strings are compared as they are, letter case included.
``lavis``
    The port behind the tables of FRAMES-VQA: the prediction is always normalised fully, the answers only in their
    punctuation and only where the annotators disagree.

Both remove every period that does not start decimals; the published programs pass a flag where `re.sub` takes a count,
and so keep those after the 32nd. Where a question has one answer (GQA, generated data, yes/no sets) leaving it out
would leave nothing: common ports score such questions 0. Here both sides are normalised fully and compared.

Classification by generation (DomainNet, ``top1``) asks for the class's name: the text must equal it, or one of its
synonyms where a sample has several answers, after full normalisation of both; a longer text that contains it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, get_args

from scale_digrap.errors import ScaleDigrapError

Variant = Literal["official", "lavis"]
VARIANTS: tuple[str, ...] = get_args(Variant)
VQA_METRICS: tuple[str, ...] = tuple(f"vqa/{variant}" for variant in VARIANTS)

# An annotator's word with ONE apostrophe forgotten maps to the full form: "dont" → "don't", "couldnt've" and
# "couldn'tve" → "couldn't've". Forms whose bare spelling is another word (she'd, we'll, it's, …) are not in the
# benchmark's table.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
# The benchmark's own table has this entry the wrong way round, and scores depend on it.
_CONTRACTIONS["somebody'd"] = "somebodyd"

_NUMBERS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # a period that does not start decimals


class ScorerError(ScaleDigrapError, ValueError):
    """An unknown metric, or a question that no metric can score."""


def clean(text: str) -> str:
    """Line breaks and tabs become spaces, the ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Remove punctuation that touches a space (or all of it in a text like "1,000"), else turn it into a space."""
    thousands = _DIGIT_COMMA_DIGIT.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        if mark in text:
            loose = thousands or f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if loose else " ")
    return _PERIOD.sub("", out)


def normalize_words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back, single spaces."""
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=65536)
def normalize(text: str) -> str:
    """The benchmark's full normalisation: `strip_punctuation`, then `normalize_words`."""
    return normalize_words(strip_punctuation(clean(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "official") -> float:
    """Score one prediction against its annotators' answers.

    Args:
        prediction: the generated text, special tokens removed.
        answers: one string per annotator (ten in VQAv2), or a single one.
        variant: "official" or "lavis", see the module's docstring.

    Returns:
        The consensus accuracy in [0, 1]. With ten answers, of which n equal the prediction: 0, .3, .6, .9 and 1 for n
        = 0, 1, 2, 3 and ≥ 4. With two or three annotators "three others agree" cannot happen; there all the others
        must.

    Raises:
        ScorerError: `answers` is empty or `variant` is unknown.
    """
    if variant not in VARIANTS:
        raise ScorerError(f"unknown VQA scoring variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if not answers:
        raise ScorerError("a question without answers cannot be scored: leave it out of the shards or give its answers")
    if len(answers) == 1:
        return float(normalize(prediction) == normalize(answers[0]))

    if variant == "official":
        prediction, references = clean(prediction), [clean(answer) for answer in answers]
        if len(set(references)) > 1:
            prediction, references = normalize(prediction), [normalize(answer) for answer in references]
    else:
        prediction, references = normalize(prediction), list(answers)
        if len(set(references)) > 1:
            references = [strip_punctuation(answer) for answer in references]

    matches = sum(answer == prediction for answer in references)
    needed = min(3, len(references) - 1)
    without_a_match = min(1.0, matches / needed)
    without_itself = min(1.0, (matches - 1) / needed)
    total = (len(references) - matches) * without_a_match + matches * without_itself
    return total / len(references)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any of the answers after full normalisation, else 0.0.

    Raises:
        ScorerError: `answers` is empty.
    """
    if not answers:
        raise ScorerError("a question without answers cannot be scored: leave it out of the shards or give its answers")
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


Scorer = Callable[[str, Sequence[str]], float]


def scorer(metric: str) -> Scorer:
    """The scoring function behind a metric's name.

    Args:
        metric: "vqa/official", "vqa/lavis", "exact" or "top1".

    Raises:
        ScorerError: another name.
    """
    if metric in ("exact", "top1"):  # one rule, two names: a column of classes reads "top-1"
        return exact_match
    kind, _, variant = metric.partition("/")
    if kind == "vqa" and variant in VARIANTS:
        return lambda prediction, answers: vqa_accuracy(prediction, answers, variant)
    raise ScorerError(f"unknown metric {metric!r}: choose one of {', '.join([*VQA_METRICS, 'exact', 'top1'])}")
