"""The command line of the data tools: what it writes, prints and returns, in its own process where that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scale_digrap.cli import main
from scale_digrap.data.index import index_shards
from scale_digrap.data.shards_cli import size
from tests.data.damage import STRUCTURAL
from tests.data.published import domainnet, jpeg, lavis, vqav2
from tests.data.web import Site, serve


@pytest.fixture
def vqa(tmp_path) -> list[str]:
    """The arguments of ``write vqa`` but for ``--to``."""
    files = vqav2(tmp_path)
    return [
        *("shards", "write", "vqa", "--questions", files["questions"], "--annotations", files["annotations"]),
        *("--images", files["images"]),
    ]


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.strip().splitlines()


def error(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_write_and_then_every_other_command(tmp_path, vqa, capsys):
    out = tmp_path / "out"
    assert main([*vqa, "--to", str(out), "--max-count", "5", "--workers", "1"]) == 0
    assert lines(capsys)[-1].startswith(f"{out}: 4 shards, 18 records, 18 samples")
    assert main([*vqa, "--to", str(out), "--max-count", "5"]) == 0  # finished: told again
    assert "4 shards" in lines(capsys)[-1]
    assert main([*vqa, "--to", str(out)]) == 2
    assert "choose another folder" in error(capsys)

    assert main(["shards", "validate", str(out), "--decode"]) == 0
    assert lines(capsys)[-1].endswith("all whole")
    (out / "manifest.json").unlink()
    assert main(["shards", "index", str(out)]) == 0
    assert "4 shards, 18 samples" in lines(capsys)[-1]

    assert main(["shards", "info", str(out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["shards"], figures["records"], figures["samples"]) == (4, 18, 18)
    assert figures["fields"] == {"jpg": 18, "json": 18}
    assert figures["answers_per_question"] == {"10": 18}
    assert figures["different_answers"] == 6
    assert figures["top_answers"]["answer 0"] == 3
    assert figures["types"]["answer_type"] == {"other": 18}
    assert figures["field_bytes"]["jpg"] == sum(3 * len(jpeg(i)) for i in range(6))
    assert main(["shards", "info", str(out)]) == 0
    assert "different  6" in capsys.readouterr().out

    assert main(["shards", "peek", str(out), "--key", "25001", "--save-image", str(tmp_path / "saved.jpg")]) == 0
    printed = capsys.readouterr().out
    assert '"question": "What is number 1 of 1?"' in printed
    assert "48 × 32" in printed
    assert (tmp_path / "saved.jpg").read_bytes() == jpeg(1)
    assert main(["shards", "peek", str(out), "-n", "2", "--skip", "17"]) == 0
    assert capsys.readouterr().out.count(".json") == 1
    assert main(["shards", "peek", str(out), "--key", "none"]) == 2
    assert "no record of key 'none'" in error(capsys)


def test_grouped_records_count_questions(tmp_path, vqa, capsys):
    assert main([*vqa, "--to", str(tmp_path / "out"), "--group"]) == 0
    assert "6 records, 18 samples" in lines(capsys)[-1]
    assert main(["shards", "info", str(tmp_path / "out"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["records"], figures["samples"], figures["answers_per_question"]) == (6, 18, {"10": 18})


def test_the_other_sources(tmp_path, capsys):
    file, images = lavis(tmp_path)
    assert main(["shards", "write", "lavis", "--annotations", file, "--images", images, "--to", f"{tmp_path}/a"]) == 0
    listed, root = domainnet(tmp_path)
    assert main(["shards", "write", "image-list", listed, "--images", root, "--to", f"{tmp_path}/b"]) == 0
    assert (
        main(["shards", "write", "image-folder", f"{root}/real", "--question", "which?", "--to", f"{tmp_path}/c"]) == 0
    )
    assert [line.partition(": ")[2][:19] for line in lines(capsys)] == [
        "1 shards, 8 records",
        "1 shards, 9 records",
        "1 shards, 9 records",
    ]
    assert main(["shards", "info", f"{tmp_path}/b"]) == 0
    assert "classes    3, 3 to 3 records each" in capsys.readouterr().out


def test_easy_vqa_is_a_source_too(tmp_path, monkeypatch, capsys):
    from scale_digrap.quickstart import data

    asked = []

    def build(folder, seed):
        asked.append((folder, seed))
        return data.QuickstartData(folder, [folder / "a.tar"], {"id": [folder / "b.tar"] * 2}, {}, {})

    monkeypatch.setattr(data, "build", build)
    assert main(["shards", "write", "easy-vqa", "--to", str(tmp_path), "--seed", "3"]) == 0
    assert asked == [(tmp_path, 3)]
    assert lines(capsys) == ["train: 1 shards", "suite id: 2 shards"]


def test_missing_pictures(tmp_path, vqa, capsys):
    next((tmp_path / "images").rglob("*.jpg")).unlink()
    assert main([*vqa, "--to", str(tmp_path / "out")]) == 2
    assert "1 of 6 images do not exist" in error(capsys)
    assert main([*vqa, "--to", str(tmp_path / "out"), "--allow-missing", "1"]) == 0
    printed = lines(capsys)
    assert "15 samples" in printed[0]
    assert printed[1].startswith("left out: 3 records, for 1 missing or unreadable images")


def test_validate_and_repair_of_damaged_shards(tmp_path, vqa, capsys):
    out = tmp_path / "out"
    assert main([*vqa, "--to", str(out), "--max-count", "9"]) == 0
    for file in (*out.glob("*.idx"), *out.glob("*.json")):
        file.unlink()
    shard = out / "shard-000001.tar"
    shard.write_bytes(STRUCTURAL["zeroed header"](shard.read_bytes()))
    capsys.readouterr()
    assert main(["shards", "validate", str(out)]) == 1
    found, summary = lines(capsys)
    assert found.startswith(f"{shard}, byte ")
    assert summary.endswith("1 shards with damage")
    assert main(["shards", "validate", str(out), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert [one["ok"] for one in content["shards"]] == [True, False]
    assert isinstance(content["shards"][1]["offset"], int)

    assert main(["shards", "info", str(out)]) == 2
    assert "shard-000001.tar, byte" in error(capsys)
    with pytest.raises(SystemExit) as refused:
        main(["shards", "repair", str(out), "--to", str(tmp_path / "mended")])
    assert refused.value.code == 2
    capsys.readouterr()
    assert main(["shards", "repair", str(out), "--to", str(tmp_path / "mended"), "--drop-bad"]) == 0
    assert "16 records kept, 2 dropped" in lines(capsys)[-1]
    assert main(["shards", "validate", str(tmp_path / "mended"), "--decode"]) == 0
    assert main(["shards", "repair", str(tmp_path / "mended"), "--to", str(tmp_path / "again"), "--drop-bad"]) == 0
    assert "nothing wrong" in lines(capsys)[-1]
    assert not (tmp_path / "again").exists()


def test_validate_in_a_process_of_its_own(tmp_path, vqa):
    assert main([*vqa, "--to", str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "shard-000000.tar"
    command = [sys.executable, "-m", "scale_digrap", "shards", "validate", str(tmp_path / "out"), "--workers", "1"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    shard.write_bytes(STRUCTURAL["cut at a member"](shard.read_bytes()))
    result = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert "cut off" in result.stdout


def test_what_a_shard_prints_cannot_steer_the_terminal(tmp_path, capsys):
    file, images = lavis(tmp_path)
    entries = json.loads(Path(file).read_text())
    entries[0]["question"] = "\x1b[31mred\x9b31m"
    Path(file).write_text(json.dumps(entries[:1]))
    assert main(["shards", "write", "lavis", "--annotations", file, "--images", images, "--to", f"{tmp_path}/a"]) == 0
    for command in (["peek"], ["info"], ["info", "--json"]):
        assert main(["shards", *command, f"{tmp_path}/a"]) == 0
    printed = capsys.readouterr().out
    assert "red" in printed
    assert not {"\x1b", "\x9b"} & set(printed)


def test_remote_shards(tmp_path, vqa, capsys):
    out = tmp_path / "out"
    assert main([*vqa, "--to", str(out), "--max-count", "9"]) == 0
    capsys.readouterr()
    files = {f"/d/{path.name}": path.read_bytes() for path in out.iterdir() if path.suffix != ".idx"}
    with serve(Site(files)) as site:
        url = site.url("/d/manifest.json")
        assert main(["shards", "validate", url, "--cache-dir", str(tmp_path / "cache")]) == 0
        assert "18 samples" in lines(capsys)[-1]
        assert main(["shards", "validate", url]) == 2
        assert "set cache_dir" in error(capsys)
        site.files["/d/shard-000001.tar"] = b"x"
        assert main(["shards", "validate", url, "--cache-dir", str(tmp_path / "cache2")]) == 1
        assert "shard-000001.tar, byte 0: not a whole tar file" in capsys.readouterr().out


def test_a_killed_write_command_goes_on(tmp_path, vqa, capsys):
    files = vqav2(tmp_path / "large", images=100)
    for path in Path(files["images"]).rglob("*.jpg"):
        path.write_bytes(jpeg(1, (640, 480)))
    command = ["shards", "write", "vqa", "--questions", files["questions"], "--annotations", files["annotations"]]
    command += ["--images", files["images"], "--to", str(tmp_path / "out"), "--max-count", "10", "--resize", "64"]
    process = subprocess.Popen([sys.executable, "-m", "scale_digrap", *command], start_new_session=True)
    staging, deadline = tmp_path / ".out.writing", time.monotonic() + 60
    while len(list(staging.glob("*.tar"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert lines(capsys)[0].startswith("went on after ")
    assert index_shards(sorted((tmp_path / "out").glob("*.tar"))).samples == 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "/no/such.tar"], "no such shard: /no/such.tar"),
        (["validate", "{tmp}"], "holds neither manifest.json nor a *.tar"),
        (["index", "{tmp}"], "holds no *.tar"),
        (["index", "/no/folder"], "no such folder"),
        (["info", "{tmp}/*.tar"], "no file matches"),
        (["peek", "x.tar", "-n", "0"], "--count"),
        (["write", "vqa", "--questions", "q", "--annotations", "a", "--images", "i", "--to", "t"], "cannot read a"),
        (["write", "lavis", "--annotations", "a", "--images", "/no", "--to", "t"], "no such image folder: /no"),
        (["write", "image-folder", "/no", "--to", "t"], "no such image folder"),
        (["write", "image-folder", "{tmp}", "--to", "t", "--max-count", "0"], "max_count must be at least 1"),
        (["repair", "/no/such.tar", "--to", "{tmp}/x", "--drop-bad"], "no such shard"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, arguments, words, capsys):
    assert main(["shards", *(one.replace("{tmp}", str(tmp_path)) for one in arguments)]) == 2
    assert words in error(capsys)


def test_sizes():
    assert [size(text) for text in ("65536", "500M", "1.5G", "2GiB", "1 kb")] == [
        65536,
        500 << 20,
        3 << 29,
        2 << 30,
        1024,
    ]
    with pytest.raises(Exception, match="'many' is no size"):
        size("many")


@pytest.mark.parametrize("arguments", [["validate", "--help"], ["write", "vqa", "--help"]])
def test_help_imports_next_to_nothing(arguments):
    code = f"""
import sys
from scale_digrap.cli import main
try:
    main(["shards", *{arguments!r}])
except SystemExit as end:
    sys.exit(3 if {{"torch", "numpy", "PIL", "webdataset"}} & set(sys.modules) else end.code)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_data_tools_run_without_torch(tmp_path, vqa):
    out = str(tmp_path / "out")
    code = f"""
import sys
from scale_digrap.cli import main
assert main({[*vqa, "--to", out]!r}) == 0
assert main(["shards", "validate", {out!r}, "--decode"]) == 0
sys.exit(3 if {{"torch", "webdataset"}} & set(sys.modules) else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
