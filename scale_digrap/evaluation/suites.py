"""What a model is evaluated on: suites, tagged by how far and in what they differ from the training data.

The groups follow FRAMES-VQA: `id`, near OOD (the same task with a shift in the image, the question, the answers or
several at once) and far OOD (other skills). A group's score is the plain mean over its suites, whatever their sizes,
and is None as soon as one of the suites it should have is missing: an average over fewer suites is a different number
and must not stand in the same column. For the same reason suites of different benchmarks (FRAMES-VQA and GQA, say)
are never averaged together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from scale_digrap.errors import ScaleDigrapError
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


class SuiteError(ScaleDigrapError, ValueError):
    """A suite that makes no sense, or whose shards are not what it says they are."""


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
    """Tar files, folders, brace patterns or globs, as `EvalLoader` takes them. Empty: the suite is missing, and with it
    every average that it belongs to."""
    expected: int | None = None
    """Number of questions, where it is known; another number is an error."""
    verified: bool = True
    """False where `expected` is what is commonly reported of the set, not a figure read in its publication or files."""
    benchmark: str = ""
    """Suites of one benchmark are averaged together, those of different ones never."""
    files: tuple[str, ...] = ()
    """The official files that its shards are written from."""
    command: str = ""
    """What writes them: the arguments of ``scale-digrap shards write``."""

    def __post_init__(self) -> None:
        if not self.name:
            raise SuiteError("a suite needs a name")
        if "/" in self.name or self.name.startswith("."):
            raise SuiteError(f"suite {self.name!r}: its name becomes a file name, so no '/' and no leading '.'")
        for field, value, known in (("group", self.group, get_args(Group)), ("shift", self.shift, get_args(Shift))):
            if value not in known:
                raise SuiteError(f"suite {self.name!r}: {field} must be one of {', '.join(known)}, got {value!r}")
        if (self.group == "id") != (self.shift == "none"):
            raise SuiteError(
                f"suite {self.name!r}: group 'id' goes with shift 'none' and only with it, got {self.group!r} and "
                f"{self.shift!r}"
            )
        if self.expected is not None and (isinstance(self.expected, bool) or not isinstance(self.expected, int)):
            raise SuiteError(f"suite {self.name!r}: expected must be a number of questions, got {self.expected!r}")
        scorer(self.metric)  # an unknown metric must show before a model is loaded

    def at(self, shards: str | Path | Iterable[str | Path]) -> Suite:
        """The same suite, reading these shards."""
        if isinstance(shards, (str, Path)):
            shards = [shards]
        return dataclasses.replace(self, shards=tuple(str(shard) for shard in shards))

    @property
    def heading(self) -> str:
        return self.title or self.name

    @property
    def missing(self) -> bool:
        """It should be there and has no shards."""
        return not self.shards

    def check_count(self, questions: int) -> None:
        """Compare the number of questions with the expected one.

        Raises:
            SuiteError: they differ, or there is none at all.
        """
        if questions == 0:
            raise SuiteError(f"suite {self.name!r} has no questions: check its shards {list(self.shards)}")
        if self.expected is None or questions == self.expected:
            return
        message = f"suite {self.name!r} has {questions} questions, expected {self.expected}: its shards are incomplete "
        message += "or of another version of the set. "
        if not self.verified:
            message += "The expected number is as commonly reported and may be wrong. "
        raise SuiteError(
            f"{message}If {questions} is right, say so in the configuration: suites.custom.{self.name}: "
            f"{{expected: {questions}}}"
        )


class SuiteRegistry(Mapping[str, Suite]):
    """Suites by name, in the order of registration, which is the order of columns.

    Args:
        suites: to register.
        benchmark: given to every suite that names none itself.
        title: of the set as a whole.
    """

    def __init__(self, suites: Iterable[Suite] = (), *, benchmark: str = "", title: str = ""):
        self.benchmark, self.title = benchmark, title or benchmark
        self._suites: dict[str, Suite] = {}
        for suite in suites:
            self.register(suite)

    def register(self, suite: Suite) -> Suite:
        if suite.name in self._suites:
            raise SuiteError(f"a suite named {suite.name!r} is registered already: choose another name")
        if not suite.benchmark:
            suite = dataclasses.replace(suite, benchmark=self.benchmark)
        self._suites[suite.name] = suite
        return suite

    def __getitem__(self, name: str) -> Suite:
        try:
            return self._suites[name]
        except KeyError:
            raise KeyError(f"no suite named {name!r}; there are: {', '.join(self._suites) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._suites)

    def __len__(self) -> int:
        return len(self._suites)


def average_members(suites: Sequence[Suite]) -> dict[str, tuple[str, ...]]:
    """The names of the suites that should enter each average; averages without any are left out.

    The suites of a built-in benchmark count whether they are in the list or not: a run on three of its near OOD suites
    has no near average.

    Args:
        suites: in the order of columns.

    Returns:
        Average → names of suites. Averages are named as in `AVERAGES`; with suites of several benchmarks,
        ``BENCHMARK:near`` and so on.
    """
    from scale_digrap.evaluation.registry import REGISTRIES

    benchmarks = list(dict.fromkeys(suite.benchmark for suite in suites))
    result: dict[str, tuple[str, ...]] = {}
    for benchmark in benchmarks:
        members = {suite.name: suite for suite in REGISTRIES.get(benchmark, {}).values()}
        members |= {suite.name: suite for suite in suites if suite.benchmark == benchmark}
        for name, groups in AVERAGES.items():
            names = tuple(member.name for member in members.values() if member.group in groups)
            if names:
                result[name if len(benchmarks) == 1 else f"{benchmark or 'custom'}:{name}"] = names
    return result


def averages(scores: Mapping[str, float | None], suites: Sequence[Suite]) -> dict[str, float | None]:
    """Group averages.

    Args:
        scores: suite name → score; a suite that was not evaluated is absent or None.
        suites: every suite that SHOULD be there.

    Returns:
        For each name in `AVERAGES`, the mean over its groups' suites, or None where one of them is missing or there
        is none. With suites of several benchmarks, for each average of `average_members`.

    Raises:
        SuiteError: a score of a suite that is not among `suites`.
    """
    strangers = set(scores) - {suite.name for suite in suites}
    if strangers:
        raise SuiteError(f"scores of unknown suites {sorted(strangers)}; expected {[suite.name for suite in suites]}")
    members = average_members(suites)
    result: dict[str, float | None] = {}
    for name in [*(AVERAGES if len({suite.benchmark for suite in suites}) <= 1 else ()), *members]:
        values = [scores.get(member) for member in members.get(name, ())]
        present = [score for score in values if score is not None]
        result[name] = sum(present) / len(present) if values and len(present) == len(values) else None
    return result
