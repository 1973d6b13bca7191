from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from scale_digrap.evaluation.caveats import caveats
from scale_digrap.evaluation.layer_plots import short_name
from scale_digrap.evaluation.page import html
from scale_digrap.evaluation.report import write_report
from scale_digrap.evaluation.results import Comparison, Method, MethodRun, ResultsError
from scale_digrap.evaluation.runner import Record, SuiteResult
from scale_digrap.evaluation.suites import Suite
from scale_digrap.evaluation.tables import csv_table, differences, markdown_table, rich_differences, rich_table
from tests.evaluation.synthetic import METHODS, comparison

VOID = {"meta", "img", "br", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Page(HTMLParser):
    """Checks nesting, collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_startendtag(self, tag, attrs):  # <path … /> inside a figure
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(comparison(), tmp_path_factory.mktemp("report")).parent


def test_every_file_is_written(report: Path):
    assert {path.name for path in report.iterdir()} == {
        "results.json",
        "table.md",
        "table.csv",
        "report.html",
        "accuracy.png",
        "groups.png",
        "id_ood.png",
        "wise.png",
        "layers_full-digrap.png",
        "layers_lora-digrap.png",
        "drift_full.png",
        "drift_lora.png",
    }


def test_pictures_show_something(report: Path):
    for path in report.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 400, path.name
            pixels = np.asarray(picture.convert("RGB"), dtype=np.int16).reshape(-1, 3)
        coloured = (np.ptp(pixels, axis=1) > 40).mean()
        assert coloured > 0.001, f"{path.name} is blank"


def test_html_needs_nothing_beside_it(report: Path):
    text = (report / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert text.count("<svg") == 8
    for source in page.loads:
        assert source.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"https?://|url\((?!#)|@import|<script src", text)
    identifiers = re.findall(r' id="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers))
    for target in re.findall(r'(?:url\(|href=")#([^")]*)', text):
        assert target in identifiers
    for method in METHODS:
        assert method.label in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_browser_opens_it_without_errors_and_sorts(report: Path, tmp_path: Path):
    """The page is opened once as it is, for the screenshot, and once with a script that sorts by a column and leaves
    what came of it in the page."""
    probe = """<script>
      var table = document.querySelector("table.sortable"), head = table.querySelectorAll("thead th")[1];
      function order() { return Array.from(table.tBodies[0].rows, function (r) { return r.cells[0].innerText; }); }
      var seen = {before: order()};
      head.click(); seen.down = order(); head.click(); seen.up = order();
      document.title = JSON.stringify(seen);
    </script></body>"""
    sorted_page = tmp_path / "probe.html"
    sorted_page.write_text((report / "report.html").read_text().replace("</body>", probe))
    browser = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,2000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    shot = subprocess.run(
        [*browser, f"--screenshot={tmp_path / 'shot.png'}", (report / "report.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    dumped = subprocess.run([*browser, "--dump-dom", sorted_page.as_uri()], capture_output=True, text=True, timeout=60)
    for run in (shot, dumped):
        assert run.returncode == 0, run.stderr
        assert not [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    with Image.open(tmp_path / "shot.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.int16).reshape(-1, 3)
    assert (np.ptp(pixels, axis=1) > 40).mean() > 0.001
    orders = json.loads(unescape(re.search(r"<title>(.*?)</title>", dumped.stdout, re.DOTALL).group(1)))
    table = comparison().table
    ranked = sorted((m for m in METHODS), key=lambda m: -table[m.key]["id"].mean)
    assert orders["before"] == [method.label for method in METHODS]
    assert orders["down"] == [method.label for method in ranked]
    assert orders["up"][0] == min(METHODS, key=lambda m: table[m.key]["id"].mean).label


def test_results_json(report: Path):
    data = json.loads((report / "results.json").read_text())
    assert data["schema"] == 2
    cell = data["table"]["full-digrap"]["id"]
    assert 0.9 < cell["mean"] < 1.0
    assert cell["interval"]["low"] < cell["mean"] < cell["interval"]["high"]
    assert cell["std"] is None
    assert {"method": "full-digrap", "other": "full-adamw"}.items() <= data["differences"][1].items()
    assert [suite["questions"] for suite in data["suites"]] == [200] * 6


def test_tables_agree(report: Path):
    table = (report / "table.md").read_text()
    made = comparison()
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(rich_table(made, console))
    terminal = console.file.getvalue()
    near = np.mean(
        [made.run("full-adamw", 0).suites[name].accuracy for name in ("vision", "question", "answer", "multimodal")]
    )
    for text in (table, terminal, (report / "report.html").read_text()):
        assert f"{100 * near:.1f}" in text


def test_a_narrow_terminal_gets_whole_figures_of_fewer_columns():
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(rich_table(comparison(seeds=2), console))
    text = console.file.getvalue()
    assert "…" not in text
    assert "Near OOD" in text
    assert "Multimodal" not in text
    assert "every suite: table.md" in text.replace("\n", " ")
    console.print(rich_differences(comparison(seeds=2)))
    assert "DiGraP − AdamW" in console.file.getvalue()
    assert "…" not in console.file.getvalue()


def test_missing_suite_shows_in_its_averages_and_in_the_notes():
    made = comparison(missing="answer")
    row = next(line for line in markdown_table(made).splitlines() if line.startswith("| LoRA DiGraP"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [index for index, cell in enumerate(cells) if cell == "–"] == [4]
    near, ood, everything = "incomplete (3 of 4)", "incomplete (4 of 5)", "incomplete (5 of 6)"
    assert {index: cell for index, cell in enumerate(cells) if "incomplete" in cell} == {6: near, 8: ood, 9: everything}
    assert "Incomplete, marked –: LoRA DiGraP" in markdown_table(made)
    assert "**Missing results.** LoRA DiGraP: Answer." in markdown_table(made)
    columns, rows = differences(made)
    assert [column.key for column in columns] == ["id", "near", "far", "ood", "all"]
    (row,) = [row for row in rows if row.label == "LoRA DiGraP − LoRA AdamW"]
    assert [cell.text == "–" for cell in row.cells] == [False, True, False, True, True]


def test_a_suite_of_the_benchmark_that_nobody_answered_leaves_its_group_incomplete():
    made = comparison()
    made.suites = made.suites[:2]  # the registry knows that there are four near suites
    for run in made.runs:
        run.suites = {name: run.suites[name] for name in ("id", "vision")}
    assert made.table["full-adamw"]["near"] is None
    assert "incomplete (1 of 4)" in markdown_table(made)
    (missing,) = [caveat for caveat in caveats(made) if caveat.title == "Missing suites"]
    assert "answer, far, multimodal, question" in missing.text


def test_csv_has_every_figure():
    made = comparison(seeds=2, missing="answer")
    lines = list(csv.DictReader(io.StringIO(csv_table(made))))
    assert len(lines) == len(METHODS) * len(made.columns)
    for line in lines:
        cell = made.table[line["method"]][line["column"]]
        if cell is None:
            assert (line["mean"], line["low"]) == ("", "")
            assert int(line["present"]) < int(line["suites"])
        else:
            assert float(line["mean"]) == cell.mean
            assert float(line["high"]) == cell.interval.high
            assert line["metric"] == "vqa/official"


def test_warnings_come_first():
    made = comparison(seeds=1)
    made.leakage = {
        "rows": [
            {
                "suite": "vision", "questions": 200, "leaked": 50, "fraction": 0.25, "marked": True,
                "matches": {"question_id": 50, "question_and_image": 40, "exact_image": 0, "near_image": 0},
            },
            {
                "suite": "far", "questions": 200, "leaked": 0, "fraction": 0.0, "marked": False,
                "matches": {"question_id": 0, "question_and_image": 0, "exact_image": 0, "near_image": 0},
            },
        ],
        "missing": ["answer"], "train": {"questions": 1000, "images": 400},
    }  # fmt: skip
    made.runs[1].suites["id"].excluded = {"no answers": 3}
    made.runs[2].suites["id"].metric = "vqa/lavis"
    made.runs[1].provenance["template"] = {"prompt": "{question}"}
    made.runs[2].provenance["template"] = {"prompt": "Question: {question} Answer:"}
    made.environment["commit"] = "0123456789ab with uncommitted changes"
    found = {caveat.title: caveat for caveat in caveats(made)}
    assert list(found) == [
        "Leak", "Different scorers", "Different prompts", "Not compared", "Excluded questions", "No paired difference",
        "One seed", "Uncommitted changes",
    ]  # fmt: skip
    expected = "Vision: 50 of 200 questions are in the training data (25.0 %: question id 50, question and image 40)."
    assert found["Leak"].text == expected
    assert "ID: 3 (no answers)" in found["Excluded questions"].text
    assert "vqa/lavis for DiGraP" in found["Different scorers"].text
    assert '"Question: {question} Answer:"} for DiGraP' in found["Different prompts"].text
    table = markdown_table(made)
    assert table.index("> **Leak.**") < table.index("| Method")
    assert "Leakage: " in table
    assert "| Vision† |" in table
    assert "Near OOD (mean of 4)†" in table
    assert "| Far |" in table
    assert "† Vision: 50 of 200" in table
    assert "by vqa/official, vqa/lavis" in table
    page = html(made, {}, {})
    assert page.index("<b>Leak.</b>") < page.index("<table")
    # scores of different scorers are not subtracted
    assert made.difference("full-digrap", "full-adamw", made.columns[0]) is None
    assert made.difference("full-digrap", "full-adamw", made.columns[1]) is not None


def _two_methods(a: list[float], b: list[float], seeds: int = 1) -> Comparison:
    suite = Suite(name="id", group="id", shift="none", title="ID")
    methods = [Method(key="a", label="A", family="full"), Method(key="b", label="B", family="full", baseline="a")]
    runs = []
    for seed in range(seeds):
        for key, scores in (("a", a), ("b", b)):
            records = [Record(str(i), "", ["x"], score) for i, score in enumerate(scores)]
            runs.append(MethodRun(method=key, seed=seed, suites={"id": SuiteResult("id", suite.metric, records)}))
    return Comparison(methods=methods, suites=[suite], runs=runs)


def test_bold_is_the_best_and_what_is_not_distinguishable():
    column = comparison().columns[0]
    clear = _two_methods([1.0] * 90 + [0.0] * 10, [1.0] * 60 + [0.0] * 40)
    assert clear.best(column) == ["a"]
    assert differences(clear)[1][0].cells[0].sign == -1
    close = _two_methods([1.0] * 90 + [0.0] * 10, [0.0] * 2 + [1.0] * 88 + [0.0] * 9 + [1.0])
    assert close.best(column) == ["a", "b"]
    assert differences(close)[1][0].cells[0].sign == 0
    same = _two_methods([1.0] * 50, [1.0] * 50)
    assert same.best(column) == ["a", "b"]


def test_a_method_without_seeds_is_compared_with_every_seed():
    made = comparison(seeds=3)
    column = made.columns[0]
    paired = made.difference("full-adamw", "zero-shot", column)
    tuned = np.mean([run.suites["id"].accuracy for run in made.runs_of("full-adamw")])
    assert paired.mean == pytest.approx(tuned - made.run("zero-shot", 0).suites["id"].accuracy)
    assert paired.half_width > 0
    assert made.table["zero-shot"]["id"].std is None
    assert made.table["full-adamw"]["id"].std > 0


def test_runs_survive_the_disk(tmp_path: Path):
    run = comparison().run("full-digrap", 0)
    path = run.save(tmp_path)
    assert MethodRun.load(path) == run
    assert [entry.name for entry in tmp_path.iterdir()] == ["full-digrap-seed0.json"]
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ResultsError, match="is not a result file"):
        MethodRun.load(path)


def test_results_that_do_not_belong_together_are_refused():
    made = comparison()
    with pytest.raises(ResultsError, match="unknown method 'full-adamw'"):
        Comparison(methods=METHODS[:1], suites=made.suites, runs=made.runs)
    with pytest.raises(ResultsError, match="two results"):
        Comparison(methods=METHODS, suites=made.suites, runs=[*made.runs, made.runs[0]])
    made.runs[0].fingerprint = "other"
    with pytest.raises(ResultsError, match="different settings"):
        Comparison(methods=METHODS, suites=made.suites, runs=made.runs)
    odd = _two_methods([1.0] * 5, [0.0] + [1.0] * 4)
    expected = odd.difference("a", "b", odd.columns[0])
    again = _two_methods([1.0] * 5, [0.0] + [1.0] * 4)
    again.runs[0].suites["id"].records.reverse()  # the same questions in another order
    assert again.difference("a", "b", again.columns[0]) == expected


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.weight", "text 3 attn q"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision 0 mlp fc1"),
        ("model.vision_tower.encoder.layers.0.layer_norm1.bias", "vision 0 layer_norm1 bias"),
        ("model.multi_modal_projector.linear.weight", "projector linear"),
        ("model.language_model.embed_tokens.weight", "text embed"),
        ("base_model.model.model.language_model.layers.11.self_attn.v_proj.lora_B.default.weight", "text 11 attn v B"),
        ("model.visual.blocks.7.attn.qkv.weight", "vision 7 attn qkv"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_layer_names_are_short(name: str, short: str):
    assert short_name(name) == short
