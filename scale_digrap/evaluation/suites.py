"""What a model is evaluated on: suites, tagged by how far and in what they differ from the training data.

The groups follow FRAMES-VQA: `id`, near OOD (the same task with a shift in the image, the question, the answers or
several at once) and far OOD (other skills). A group's score is the plain mean over its suites, whatever their sizes,
and is None as soon as one of the suites it should have is missing: an average over fewer suites is a different number
and must not stand in the same column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from scale_digrap.evaluation.scorers import scorer

Group = Literal["id", "near", "far"]
Shift = Literal["none", "vision", "question", "answer", "multimodal", "adversarial", "skill"]

#: Averages shown beside the suites: name → the groups whose suites enter it, each suite with the same weight.
AVERAGES: Mapping[str, tuple[str, ...]] = {
    "near": ("near",),
    "far": ("far",),
    "ood": ("near", "far"),
    "all": ("id", "near", "far"),
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One evaluation set."""

    name: str
    """Unique, short, lower case: a column's key in every result file."""
    group: Group
    """How far from the training distribution."""
    shift: Shift
    """What differs from the training distribution."""
    title: str = ""
    """Column heading; the name where empty."""
    description: str = ""
    """One sentence for the report."""
    metric: str = "vqa/official"
    """See `scorers.scorer`."""
    shards: tuple[str, ...] = ()
    """Tar files, brace patterns or globs, as `EvalLoader` takes them."""
    expected: int | None = None
    """Number of questions, where it is known; another number is an error."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a suite needs a name")
        for field, value, known in (("group", self.group, get_args(Group)), ("shift", self.shift, get_args(Shift))):
            if value not in known:
                raise ValueError(f"suite {self.name!r}: {field} must be one of {', '.join(known)}, got {value!r}")
        if (self.group == "id") != (self.shift == "none"):
            raise ValueError(
                f"suite {self.name!r}: group 'id' goes with shift 'none' and only with it, got {self.group!r} and "
                f"{self.shift!r}"
            )
        scorer(self.metric)  # an unknown metric must show before a model is loaded

    def at(self, shards: str | Path | Iterable[str | Path]) -> Suite:
        """The same suite, reading these shards."""
        if isinstance(shards, (str, Path)):
            shards = [shards]
        return dataclasses.replace(self, shards=tuple(str(shard) for shard in shards))

    @property
    def heading(self) -> str:
        return self.title or self.name


class SuiteRegistry(Mapping[str, Suite]):
    """Suites by name, in the order of registration, which is the order of columns."""

    def __init__(self, suites: Iterable[Suite] = ()):
        self._suites: dict[str, Suite] = {}
        for suite in suites:
            self.register(suite)

    def register(self, suite: Suite) -> Suite:
        if suite.name in self._suites:
            raise ValueError(f"a suite named {suite.name!r} is registered already: choose another name")
        self._suites[suite.name] = suite
        return suite

    def __getitem__(self, name: str) -> Suite:
        try:
            return self._suites[name]
        except KeyError:
            raise KeyError(f"no suite named {name!r}; there are: {', '.join(self._suites) or 'none'}") from None

    def __iter__(self):
        return iter(self._suites)

    def __len__(self) -> int:
        return len(self._suites)


#: The six of the embedded default, named as `quickstart.data.build` names their shards.
QUICKSTART = SuiteRegistry(
    [
        Suite(
            name="id",
            group="id",
            shift="none",
            title="ID",
            description="Real easy-VQA test images whose colour goes with the shape as in the training set.",
        ),
        Suite(
            name="vision",
            group="near",
            shift="vision",
            title="Vision",
            description="The same questions with the picture turned and its background replaced.",
        ),
        Suite(
            name="question",
            group="near",
            shift="question",
            title="Question",
            description="The same pictures with unseen phrasings of the questions.",
        ),
        Suite(
            name="answer",
            group="near",
            shift="answer",
            title="Answer",
            description="Real test images that break the training set's ties between colour and shape.",
        ),
        Suite(
            name="multimodal",
            group="near",
            shift="multimodal",
            title="Multimodal",
            description="Broken ties, unseen phrasings and changed pictures together.",
        ),
        Suite(
            name="far",
            group="far",
            shift="skill",
            title="Far",
            description="What the base model learnt before and fine-tuning never shows: counting and position.",
        ),
    ]
)


def averages(scores: Mapping[str, float | None], suites: Sequence[Suite]) -> dict[str, float | None]:
    """Group averages.

    Args:
        scores: suite name → score; a suite that was not evaluated is absent or None.
        suites: every suite that SHOULD be there.

    Returns:
        For each name in `AVERAGES`, the mean over its groups' suites, or None where one of them is missing or there
        is none.

    Raises:
        ValueError: a score of a suite that is not among `suites`.
    """
    strangers = set(scores) - {suite.name for suite in suites}
    if strangers:
        raise ValueError(f"scores of unknown suites {sorted(strangers)}; expected {[suite.name for suite in suites]}")
    result: dict[str, float | None] = {}
    for name, groups in AVERAGES.items():
        members = [scores.get(suite.name) for suite in suites if suite.group in groups]
        present = [score for score in members if score is not None]
        result[name] = sum(present) / len(present) if members and len(present) == len(members) else None
    return result
