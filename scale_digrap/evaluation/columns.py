"""The columns of a table: suites by group, and the averages over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scale_digrap.evaluation.suites import AVERAGES, Suite, average_members


@dataclass(frozen=True)
class Column:
    """A column of the table: a suite, or an average over suites."""

    key: str
    heading: str
    suites: tuple[str, ...]
    is_average: bool
    group: str
    """ "id", "near", "far", "ood" or "all"."""
    benchmark: str = ""


_HEADINGS = {"near": "Near OOD", "far": "Far OOD", "ood": "OOD", "all": "All"}


def columns(suites: Sequence[Suite]) -> list[Column]:
    """Per benchmark: ID, near suites and their average, far suites and theirs, then the averages over both. An average
    of a single suite is not shown again."""
    members = average_members(suites)
    benchmarks = list(dict.fromkeys(suite.benchmark for suite in suites))
    result = []
    for benchmark in benchmarks:
        prefix = f"{benchmark or 'custom'}:" if len(benchmarks) > 1 else ""
        name = f"{(benchmark or 'custom').upper()} " if len(benchmarks) > 1 else ""
        for group in ("id", *AVERAGES):
            result += [
                Column(suite.name, suite.heading, (suite.name,), False, group, benchmark)
                for suite in suites
                if suite.group == group and suite.benchmark == benchmark
            ]
            averaged = members.get(prefix + group, ())
            if len(averaged) > 1:
                result.append(Column(prefix + group, name + _HEADINGS[group], tuple(averaged), True, group, benchmark))
    return result
