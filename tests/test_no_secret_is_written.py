"""Training, evaluating and reporting with passwords in URLs and in options of a store: which file holds one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scale_digrap.cli import main
from tests.data.web import Site, serve
from tests.evaluation import evaluations
from tests.evaluation.tiny import write_suite

PASSWORD, SIGNATURE, FROM_ENVIRONMENT, LITERAL = "hunter2pass", "s1gnatureXyz", "fr0mEnv1ronment", "l1teralSecret"
SECRETS = (PASSWORD, SIGNATURE, FROM_ENVIRONMENT, LITERAL)
NEED_THEM: set[str] = set()
"""Files that hold one, because nothing works without it: none."""


def holding(*folders: Path) -> dict[str, list[str]]:
    """File → the secrets whose bytes are in it or in its name."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            data = path.read_bytes() if path.is_file() else b""
            seen = [secret for secret in SECRETS if secret.encode() in data or secret in path.name]
            if seen:
                found[str(path.relative_to(folder.parent))] = seen
    return found


@pytest.fixture
def site(tmp_path):
    """Shards of training data, with a sample that is bad, and of two suites."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_suite(folder, "id", 12, seed=0)
    write_suite(folder, "far", 6, seed=1)
    (folder / "train").mkdir()
    write_suite(folder / "train", "id", 12, seed=2, corrupt=3)
    files = {f"/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*.tar")}
    with serve(Site(files)) as served:
        yield served


def test_no_file_and_no_line_of_a_run_or_of_its_evaluation_holds_a_secret(site, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("STORE_KEY", FROM_ENVIRONMENT)
    monkeypatch.setenv("URL_PASSWORD", PASSWORD)
    base = evaluations.make_base(tmp_path / "base")
    run, out, report, cache = (tmp_path / name for name in ("run", "out", "report", "cache"))

    def url(path: str, password: str = PASSWORD) -> str:
        return f"http://me:{password}@127.0.0.1:{site.port}{path}?sig={SIGNATURE}&v=1"

    def suite(name: str) -> list[str]:
        return [url(f"/{name}-0.tar"), url(f"/{name}-1.tar")]

    data = {
        "cache_dir": str(cache),
        "storage_options": {"s3": {"key": "${oc.env:STORE_KEY}", "secret": LITERAL}},
    }
    train = [url("/train/id-0.tar", "${oc.env:URL_PASSWORD}"), url("/train/id-1.tar")]
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump(
            {
                "run_dir": str(run),
                "model": {"path": str(base), "prompt": "{question}"},
                "data": {**data, "train": train, "max_bad_fraction": 1.0},
                "training": {"steps": 3, "batch_size": 4, "device": "cpu"},
                "checkpoint": {"every": 1},
                "evaluation": {"suites": {"id": {"shards": suite("id")}}, "max_new_tokens": 2},
                "log": {"progress": False, "tensorboard": True},
            }
        )
    )
    (tmp_path / "evaluate.yaml").write_text(
        yaml.safe_dump(
            {
                "out": str(out),
                "models": {"base": {"path": str(base)}, "tuned": {"run": str(run)}},
                "suites": {
                    "set": "quickstart",
                    "only": ["id", "far"],
                    "custom": {name: {"shards": suite(name)} for name in ("id", "far")},
                },
                "data": data,
                "model": {"prompt": "{question}"},
                "generation": {"max_new_tokens": 2},
                "engine": {"device": "cpu"},
                "leakage": {"train": train},
                "shift": {"train": train[:1]},  # the bad sample is in the other one
                "progress": False,
            }
        )
    )
    said = []
    commands = [
        ["train", str(tmp_path / "train.yaml")],
        ["train", str(tmp_path / "train.yaml"), "training.steps=4"],  # goes on from the checkpoint
        ["evaluate", str(tmp_path / "evaluate.yaml")],
        ["report", str(out), "--out", str(report)],
        ["checkpoint", "show", str(run)],
        ["train", str(tmp_path / "train.yaml"), f"data.train=['{url('/gone.tar')}']", f"run_dir={tmp_path / 'run2'}",
         "data.retries=0"],
        ["train", str(tmp_path / "train.yaml"), "training.step=4"],
    ]  # fmt: skip
    for number, command in enumerate(commands):
        caplog.clear()
        status = main(command)
        printed = capfd.readouterr()
        said.append(printed.out + printed.err + caplog.text)
        assert (status == 0) == (number < 5), said[-1]

    assert not [line for text in said for line in text.splitlines() if any(secret in line for secret in SECRETS)]
    written = [path for path in (run, out, report, cache) if path.is_dir()]
    for name in ("run/config.yaml", "run/tensorboard", "run/bad_samples.rank0.jsonl", "run/checkpoints/step-4",
                 "out/leakage.json", "out/shift.json", "out/report.html", "cache"):  # fmt: skip
        assert (tmp_path / name).exists(), name
    assert set(holding(*written, *filter(Path.is_dir, [tmp_path / "run2"]))) == NEED_THEM
