"""What a reader must know before the figures: leaks, missing suites, exclusions, single seeds, what is not alike."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scale_digrap.evaluation.results import Comparison, MethodRun


@dataclass(frozen=True)
class Caveat:
    """One thing to know."""

    serious: bool
    """The figures themselves are in doubt, not only how sure they are."""
    title: str
    text: str


def leaks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Suite → its row of the leakage check, for suites with any match."""
    rows = (comparison.leakage or {}).get("rows", [])
    return {row["suite"]: row for row in rows if row["leaked"] or row["marked"]}


def leak_text(row: dict[str, Any]) -> str:
    """ "1,234 of 5,000 questions are in the training data (24.7 %: question id 1,000); 8 of 5,000 have …"."""
    kinds = ", ".join(
        f"{kind.replace('_', ' ')} {count:,}"
        for kind, count in row["matches"].items()
        if count and kind != "near_image"
    )
    near = row["matches"].get("near_image", 0)
    alike = f"{near:,} of {row['questions']:,} have an image that looks like one of its"
    if not row["leaked"]:
        return f"no question is in the training data, but {alike}"
    text = f"{row['leaked']:,} of {row['questions']:,} questions are in the training data"
    text += f" ({100 * row['fraction']:.1f} %: {kinds})"
    return f"{text}; {alike}" if near else text


def leakage_text(leakage: dict[str, Any]) -> str:
    """What the leakage check has found in all suites together."""
    rows, train = leakage["rows"], leakage.get("train", {})
    questions, leaked = sum(row["questions"] for row in rows), sum(row["leaked"] for row in rows)
    near = sum(row["matches"].get("near_image", 0) for row in rows)
    return (
        f"Leakage: {leaked:,} of {questions:,} questions are among the {train.get('questions', 0):,} of the training "
        f"data, by id, text or picture; {near:,} have a picture that looks like one of its."
    )


def metrics(comparison: Comparison, suite: str | None = None) -> list[str]:
    """The scorers used, of one suite or of all."""
    found = (
        result.metric
        for run in comparison.runs
        for name, result in run.suites.items()
        if suite is None or name == suite
    )
    return list(dict.fromkeys(found))


def caveats(comparison: Comparison) -> list[Caveat]:
    """Everything worth a warning, the worst first."""
    found = [*_leakage(comparison), *_missing(comparison), *_excluded(comparison), *_unlike(comparison)]
    seeds = {method.label: len(comparison.runs_of(method.key)) for method in comparison.methods if not method.seedless}
    single = [label for label, count in seeds.items() if count == 1]
    if single:
        which = "" if len(single) == len(seeds) else f" ({_list(single)})"
        text = f"Differences between seeds are not in these figures{which}: intervals are over questions alone."
        found.append(Caveat(False, "One seed", text))
    found += _code(comparison)
    return sorted(found, key=lambda caveat: not caveat.serious)


def _code(comparison: Comparison) -> list[Caveat]:
    several = comparison.environment.get("evaluations")
    places = several or {"": comparison.environment}
    commits = {name: str(environment.get("commit") or "unknown") for name, environment in places.items()}
    found = []
    if len(set(commits.values())) > 1:
        text = "; ".join(f"{name}: {commit}" for name, commit in commits.items())
        found.append(Caveat(False, "Different code", f"The evaluations were made by different commits: {text}."))
    changed = [name for name, commit in commits.items() if "uncommitted" in commit]
    if changed:
        which = f" in {_list(changed)}" if several else ""
        text = f"The code{which} was not that of any commit, so the figures cannot be made again from one."
        found.append(Caveat(False, "Uncommitted changes", text))
    return found


def _leakage(comparison: Comparison) -> list[Caveat]:
    if comparison.leakage is None:
        text = "Whether the suites' questions or images are in the training data was not looked at."
        return [Caveat(False, "No leakage check", text)]
    titles = {suite.name: suite.heading for suite in comparison.suites}
    found = [
        Caveat(
            bool(row["marked"]),
            ("Leak" if row["leaked"] else "Similar images") if row["marked"] else "Overlap",
            f"{titles.get(name, name)}: {leak_text(row)}.",
        )
        for name, row in leaks(comparison).items()
    ]
    unchecked = [name for name in comparison.leakage.get("missing", []) if comparison.questions(name) is not None]
    if unchecked:
        found.append(Caveat(False, "Not compared", f"Not looked for in the training data: {_list(unchecked)}."))
    return found


def _missing(comparison: Comparison) -> list[Caveat]:
    found = []
    everywhere = [s.heading for s in comparison.suites if comparison.questions(s.name) is None]
    wanted = {name for column in comparison.columns if column.is_average for name in column.suites}
    everywhere += sorted(wanted - {suite.name for suite in comparison.suites})
    if everywhere:
        text = f"{_list(everywhere)}: no results. Averages that they belong to are incomplete and not given."
        found.append(Caveat(True, "Missing suites", text))
    for method in comparison.methods:
        absent = [
            suite.heading
            for suite in comparison.suites
            if comparison.questions(suite.name) is not None
            and any(suite.name not in run.suites for run in comparison.runs_of(method.key) or [_NO_RUN])
        ]
        if absent:
            found.append(Caveat(True, "Missing results", f"{method.label}: {_list(absent)}."))
    return found


_NO_RUN = MethodRun(method="", seed=0, suites={})


def _excluded(comparison: Comparison) -> list[Caveat]:
    totals: dict[tuple[str, str], set[int]] = {}
    for run in comparison.runs:
        for name, result in run.suites.items():
            for reason, count in result.excluded.items():
                if count:
                    totals.setdefault((name, reason), set()).add(count)
    titles = {suite.name: suite.heading for suite in comparison.suites}
    parts = [
        f"{titles[name]}: {'/'.join(f'{count:,}' for count in sorted(counts))} ({reason})"
        for (name, reason), counts in totals.items()
    ]
    return [Caveat(False, "Excluded questions", f"{'; '.join(parts)}.")] if parts else []


def _unlike(comparison: Comparison) -> list[Caveat]:
    """Methods that were asked or scored differently."""
    found = []
    for suite in comparison.suites:
        scored = [(run, run.suites[suite.name].metric) for run in comparison.runs if suite.name in run.suites]
        by_metric = _by(comparison, scored)
        if len(by_metric) > 1:
            text = f"{suite.heading}: {_each(by_metric)}. Scores of different scorers are not comparable."
            found.append(Caveat(True, "Different scorers", text))
    for key, title in (("template", "Different prompts"), ("generation", "Different generation settings")):
        values = [(run, _short(run.provenance[key])) for run in comparison.runs if key in run.provenance]
        if len(by_value := _by(comparison, values)) > 1:
            found.append(Caveat(True, title, f"{_each(by_value)}."))
    for first, second in comparison.compared:
        unpaired = [
            column.heading
            for column in comparison.columns
            if not column.is_average
            and comparison.scores(first, column.key)
            and comparison.scores(second, column.key)
            and comparison.difference(first, second, column) is None
        ]
        if unpaired:
            names = [comparison.method(key).label for key in (first, second)]
            text = f"{names[0]} and {names[1]} have no seed, questions or scorer in common on {_list(unpaired)}."
            found.append(Caveat(False, "No paired difference", text))
    return found


def _by(comparison: Comparison, values: Iterable[tuple[MethodRun, str]]) -> dict[str, list[str]]:
    """Value → labels of the methods that have it."""
    found: dict[str, dict[str, None]] = {}
    for run, value in values:
        found.setdefault(value, {})[comparison.method(run.method).label] = None
    return {name: list(labels) for name, labels in found.items()}


def _each(values: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} for {_list(labels)}" for value, labels in values.items())


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _list(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
