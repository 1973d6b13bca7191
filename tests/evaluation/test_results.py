"""Result files on disk, evaluations side by side, and the command that reports them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from scale_digrap.cli import main
from scale_digrap.evaluation.caveats import caveats
from scale_digrap.evaluation.compare import load
from scale_digrap.evaluation.plots import figures
from scale_digrap.evaluation.records import Record, SuiteResult
from scale_digrap.evaluation.report import write_report
from scale_digrap.evaluation.results import Comparison, Method, MethodRun, ResultsError, write_atomically
from scale_digrap.evaluation.runs import read_layers
from scale_digrap.evaluation.shift_accuracy import correlations
from scale_digrap.evaluation.statistics import bootstrap_means, percentile_interval, units
from scale_digrap.evaluation.suites import Suite
from tests.evaluation.synthetic import comparison

SUITES = [
    Suite(name="id", group="id", shift="none", title="ID"),
    Suite(name="seen", group="near", shift="vision", title="Seen"),
    Suite(name="asked", group="near", shift="question", title="Asked"),
    Suite(name="other", group="far", shift="skill", title="Other"),
]


def records(rng: np.random.Generator, n: int, accuracy: float, images: int | None = None) -> list[Record]:
    right = np.random.default_rng(n).random(n) + rng.normal(0, 0.1, n) < accuracy
    return [
        Record(
            f"q{i:04d}", "red" if r else "blue", ["red"] * 10, float(r), "color", ("yes/no", "other")[i % 2],
            None if images is None else f"image{i % images}",
        )
        for i, r in enumerate(right)
    ]  # fmt: skip


def evaluation(
    folder: Path, *, accuracy=(0.6, 0.7), seeds=(0, 1), template="{question}", metric="vqa/official"
) -> Comparison:
    """As the runner leaves one behind: predictions in files of their own, one file per run, a report."""
    methods = [
        Method(key="zero-shot", label="Zero-shot", family="base"),
        Method(key="tuned", label="Tuned", family="full", baseline="zero-shot"),
    ]
    runs = []
    for method, chance in zip(methods, accuracy, strict=True):
        for seed in (0, 1) if method.family == "full" else (0,):
            suites = {}
            for number, suite in enumerate(SUITES):
                rng = np.random.default_rng([seed, number, len(method.key)])
                made = records(
                    rng, 60 + 20 * number, chance - 0.1 * number, images=15 if suite.name == "asked" else None
                )
                path = folder / "predictions" / f"{method.key}-seed{seed}" / f"{suite.name}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps({"index": i, **dataclasses.asdict(r)}) for i, r in enumerate(made)]
                path.write_text("\n".join(lines) + "\n")
                suites[suite.name] = SuiteResult(suite.name, metric, made, predictions=str(path))
            provenance = {"checkpoint": "step-10", "template": {"prompt": template}, "alpha": 1.0}
            run = MethodRun(method=method.key, seed=seed, suites=suites, provenance=provenance, fingerprint="f")
            run.save(folder / "runs")
            runs.append(run)
    made = Comparison(
        methods=methods, suites=SUITES, runs=runs, title="Made up", settings={"x": 1}, environment={"commit": "abc"}
    )
    write_atomically(folder / "results.json", json.dumps(made.to_json(folder)))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluations") / "first"
    evaluation(path)
    return path


def test_a_folder_is_read_as_it_was_written(folder: Path, tmp_path: Path):
    made, again = evaluation(tmp_path / "other"), Comparison.load(folder)
    for ours, theirs in zip(again.runs, made.runs, strict=True):
        assert {n: r.records for n, r in ours.suites.items()} == {n: r.records for n, r in theirs.suites.items()}
        assert dataclasses.replace(ours, suites={}) == dataclasses.replace(theirs, suites={})
    assert again.table == made.table
    assert json.loads(json.dumps(again.to_json(folder))) == json.loads((folder / "results.json").read_text())
    data = json.loads((folder / "results.json").read_text())
    assert data["schema"] == 2
    assert data["runs"][1]["predictions"]["seen"] == "predictions/tuned-seed0/seen.jsonl"
    assert data["runs"][1]["provenance"]["checkpoint"] == "step-10"
    assert data["runs"][1]["by_answer_type"]["id"]["yes/no"][1] == 30
    run = json.loads((folder / "runs" / "tuned-seed0.json").read_text())
    assert "records" not in run["suites"]["id"]
    assert run["suites"]["id"]["predictions"] == "../predictions/tuned-seed0/id.jsonl"
    moved = folder.rename(folder.with_name("moved"))
    try:
        assert Comparison.load(moved).table == made.table
    finally:
        moved.rename(folder)


def test_images_are_the_unit_where_questions_share_them(folder: Path):
    made = Comparison.load(folder)
    cell = made.table["tuned"]["asked"]
    assert cell.unit == "image"
    assert made.table["tuned"]["seen"].unit == "question"
    assert made.table["tuned"]["near"].unit == "image/question"
    runs = made.runs_of("tuned")
    scores = np.mean([run.suites["asked"].scores for run in runs], axis=0)
    codes = np.arange(100) % 15
    assert cell.interval == percentile_interval(bootstrap_means(units(scores, codes), seed=zlib.crc32(b"asked")))


def _damage_predictions(folder: Path) -> None:
    path = folder / "predictions" / "tuned-seed1" / "seen.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _damage_line(folder: Path) -> None:
    path = folder / "predictions" / "tuned-seed1" / "seen.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]))


def _older(folder: Path) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 1}))


def _no_run(folder: Path) -> None:
    (folder / "runs" / "tuned-seed1.json").unlink()


def _no_results(folder: Path) -> None:
    (folder / "results.json").unlink()


def _edit(file: str, *place: str | int, value: object):
    """Puts another value into a JSON file, as an editor would."""

    def damage(folder: Path) -> None:
        content = inner = json.loads((folder / file).read_text())
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return damage


def _line(**change: object):
    def damage(folder: Path) -> None:
        path = folder / "predictions" / "tuned-seed1" / "seen.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]) + "\n")

    return damage


RUN = "runs/tuned-seed1.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit("results.json", "methods", 0, "key", value={"a": 1}), r"a method: key is {'a': 1}, expected str"),
        (_edit("results.json", "suites", 1, "title", value=[1]), r"a suite: title is \[1\], expected str"),
        (_edit("results.json", "runs", 0, "file", value=None), r"a run names no file and method"),
        (_edit("results.json", "pairs", value=[["tuned"]]), r"pairs is \[\['tuned'\]\], expected pairs"),
        (_edit("results.json", "settings", value=[]), r"settings is \[\], expected dict\[str, Any\]"),
        (_edit(RUN, "seed", value="1"), r"tuned-seed1.json is not a result file: it: seed is '1', expected int"),
        (_edit(RUN, "drift", value={"layer": 1}), r"drift is {'layer': 1}, expected dict"),
        (_edit(RUN, "telemetry", value=[{"step": 1}]), r"telemetry is not a list of objects with a step and layers"),
        (_edit(RUN, "suites", "seen", value=3), r"a suite's result is 3, expected an object"),
        (_edit(RUN, "suites", "seen", "accuracy", value=float("nan")), r"NaN is not a finite number"),
        (_line(question_id=["q"]), r"seen.jsonl, line 1 is not a record"),
        (_line(score="1.0"), r"seen.jsonl, line 1 is not a record"),
        (_line(score=float("nan")), r"seen.jsonl, line 1 is not a record: ValueError\('NaN is no score'\)"),
        (_line(question_type={"x": 1}), r"seen.jsonl, line 1 is not a record"),
        (_damage_predictions, r"suite 'seen' was 80 questions with a score of .* but .*seen.jsonl holds 79"),
        (_damage_line, r"seen.jsonl, line 5 is not a record"),
        (_older, r"results.json has schema 1; this version reads schema 2: use the version that wrote it"),
        (_no_run, r"tuned-seed1.json is not a result file: .*No such file"),
        (_no_results, r"holds no results.json: name the folder of a finished evaluation"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, capsys, damage, message):
    evaluation(tmp_path)
    damage(tmp_path)
    with pytest.raises(ResultsError, match=message):
        Comparison.load(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("scale-digrap: error: ")
    assert not (tmp_path / "report.html").exists()


def test_two_evaluations_side_by_side(folder: Path, tmp_path: Path, capsys):
    evaluation(tmp_path / "second", accuracy=(0.6, 0.85), template="Q: {question} A:")
    assert main(["report", str(folder), str(tmp_path / "second"), "--out", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    assert "Different prompts" in shown
    both = Comparison.load(tmp_path / "both")  # a comparison can be read again too
    assert [method.label for method in both.methods] == [
        "Zero-shot (first)", "Tuned (first)", "Zero-shot (second)", "Tuned (second)",
    ]  # fmt: skip
    first, second = Comparison.load(folder), Comparison.load(tmp_path / "second")
    for column in both.columns:
        assert both.table["first:tuned"][column.key].mean == first.table["tuned"][column.key].mean
        paired = both.difference("second:tuned", "first:tuned", column)
        gap = second.table["tuned"][column.key].mean - first.table["tuned"][column.key].mean
        assert paired.mean == pytest.approx(gap)
        assert paired.seeds == 2
    assert ("second:tuned", "first:tuned") in both.compared
    assert both.difference("second:tuned", "first:tuned", both.columns[0]).sign == 1
    titles = [caveat.title for caveat in caveats(both)]
    assert titles.count("Different prompts") == 1
    page = (tmp_path / "both" / "report.html").read_text()
    assert "Between evaluations" in page
    assert "Tuned (second) − Tuned (first)" in page


def test_what_cannot_be_compared_is_refused_or_named(folder: Path, tmp_path: Path):
    other = evaluation(tmp_path / "lavis", metric="vqa/lavis")
    both = load([folder, tmp_path / "lavis"])
    assert {"Different scorers", "No paired difference"} <= {caveat.title for caveat in caveats(both)}
    assert both.difference("lavis:tuned", "first:tuned", both.columns[0]) is None
    with pytest.raises(ResultsError, match="is named twice"):
        load([folder, folder])

    for run in other.runs:
        run.suites["seen"].records.pop()
        run.suites["seen"].predictions = None
        run.save(tmp_path / "lavis" / "runs")
    with pytest.raises(ResultsError, match=r"suite 'seen' has \[79, 80\] questions in different results"):
        load([folder, tmp_path / "lavis"])

    path = tmp_path / "lavis" / "results.json"
    data = json.loads(path.read_text())
    data["suites"][1]["shift"] = "answer"
    path.write_text(json.dumps(data))
    with pytest.raises(ResultsError, match="suite 'seen' is near/vision in first and near/answer in lavis"):
        load([folder, tmp_path / "lavis"])


def test_layers_of_a_training_log(tmp_path: Path):
    layer = {"omega": 0.5, "conflict": True, "conflict_rate": 0.25, "drift": 2.0, "relative_drift": None, "cosine": 0.1}
    lines = [
        {"step": step, "time": 0.0, "layers": {"a": {**layer, "drift": float(step)}, "b": layer}}
        for step in (5, 10, 15)
    ]
    (tmp_path / "layers.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    telemetry, drift = read_layers(tmp_path / "layers.jsonl", 10)
    assert [entry["step"] for entry in telemetry] == [5, 10]
    assert telemetry[0]["layers"]["a"] == {"omega": 0.5, "conflict_rate": 0.25}
    assert drift == {"a": {"drift": 10.0, "relative_drift": None}, "b": {"drift": 2.0, "relative_drift": None}}
    assert len(read_layers(tmp_path / "layers.jsonl")[0]) == 3
    assert read_layers(tmp_path / "absent.jsonl") == ([], {})
    (tmp_path / "spd.jsonl").write_text(json.dumps({"step": 1, "layers": {"a": {**layer, "omega": None}}}))
    assert read_layers(tmp_path / "spd.jsonl") == ([], {"a": {"drift": 2.0, "relative_drift": None}})

    made = comparison()  # a log of LoRA factors, whose anchors are zero, gives absolute drifts
    for run in made.runs:
        run.drift = {name: {"drift": 1.5, "relative_drift": None} for name in run.drift}
    assert {"drift_full", "drift_lora"} <= figures(made).keys()


def test_the_command_imports_no_torch(folder: Path):
    code = (
        "import sys; from scale_digrap.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or ('torch' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, "report", str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Made up" in run.stdout


def test_a_published_model_is_compared_with_every_seed_and_others_with_their_own():
    made = comparison(seeds=3)
    column = made.columns[0]
    assert made.difference("full-adamw", "zero-shot", column).seeds == 3
    runs = [run for run in made.runs if run.method != "full-adamw" or run.seed == 1]
    fewer = Comparison(methods=made.methods, suites=made.suites, runs=runs)
    assert fewer.difference("full-digrap", "full-adamw", column).seeds == 1
    runs = [run for run in runs if run.method != "full-digrap" or run.seed == 2]
    apart = Comparison(methods=made.methods, suites=made.suites, runs=runs)
    assert apart.difference("full-digrap", "full-adamw", column) is None


def test_shift_scores_against_accuracy(tmp_path: Path):
    """A planted relation: far questions are answered wrong, and far suites have low scores."""
    made = evaluation(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "shift").mkdir()
    suites = {}
    for number, suite in enumerate(SUITES):
        result = made.run("tuned", 0).suites[suite.name]
        rows = []
        for index, record in enumerate(result.records):
            image = None if suite.name == "other" else 5 + number + rng.normal()
            question, joint = 3 * (1 - record.score) + rng.normal() + 5, rng.normal() + 5
            row = {"index": index, "question_id": record.question_id, "image": image}
            rows.append({**row, "question": question, "joint": joint})
        (tmp_path / "shift" / f"{suite.name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        suites[suite.name] = {"file": f"shift/{suite.name}.jsonl", "questions": len(rows), "without_image": 0}
        for space in ("image", "question", "joint"):
            values = [row[space] for row in rows if row[space] is not None]
            figures = {"n": len(values), "mean": np.mean(values or 0.0), "quantiles": {"0.05": 1.0, "0.95": 9.0}}
            suites[suite.name][space] = figures if values else None
    made.shift = {
        "schema": 1, "model": "tuned", "train": {"samples": 100, "questions": 1000}, "missing": [],
        "settings": {"regularization": "oas"}, "suites": suites,
    }  # fmt: skip
    found = correlations(made, tmp_path)
    across = found["tuned"]["image"]["suites"]
    accuracy = [made.scores("tuned", name).units.mean for name in ("id", "seen", "asked")]
    expected = stats.pearsonr([suites[name]["image"]["mean"] for name in ("id", "seen", "asked")], accuracy)
    assert across["n"] == 3  # "other" has no images
    assert across["pearson"] == pytest.approx(expected.statistic)
    assert across["pearson_p"] == pytest.approx(expected.pvalue)
    assert all(found["tuned"]["question"]["samples"][suite.name]["auroc"] > 0.85 for suite in SUITES)
    assert all(0.3 < found["tuned"]["joint"]["samples"][suite.name]["auroc"] < 0.7 for suite in SUITES)
    assert found["tuned"]["question"]["samples"]["id"]["correlation"]["pearson"] < -0.5
    assert "other" not in found["tuned"]["image"]["samples"]

    made.folder = tmp_path
    write_report(made, tmp_path)
    assert (tmp_path / "shift.png").stat().st_size > 1000
    assert "Shift scores" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["shift_correlations"] == json.loads(json.dumps(found))
    evaluation(tmp_path / "other")
    both = load([tmp_path / "other", tmp_path])  # the files are found from elsewhere
    assert correlations(both, Path("nowhere"))[f"{tmp_path.name}:tuned"] == found["tuned"]
    (tmp_path / "shift" / "seen.jsonl").write_text("{}")
    with pytest.raises(ResultsError, match=r"seen\.jsonl does not hold the shift scores"):
        write_report(made, tmp_path)
