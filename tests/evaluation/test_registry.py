"""Which suites there are, what a configuration takes of them, and what it may not average."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from scale_digrap.cli import main
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.shards import write_shards
from scale_digrap.evaluation.registry import DOMAINNET, FRAMES_VQA, GQA, REGISTRIES, load_suites
from scale_digrap.evaluation.suites import SuiteError, average_members, averages
from tests.data import official
from tests.evaluation.test_leakage import sample

NEAR = ("iv_vqa", "cv_vqa", "vqa_rephrasings", "vqa_cp_v2", "vqa_ce", "advqa")
FAR = ("textvqa", "vizwiz", "okvqa")
# What the authors' tool printed for PaliGemma's LoRA fine-tuning, in the order of the registry.
DUMP = dict(zip(FRAMES_VQA, (86.29, 94.43, 69.36, 78.90, 86.21, 71.73, 49.82, 42.08, 22.92, 48.30), strict=True))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Shards of every suite of FRAMES-VQA and GQA; their content does not matter."""
    for name in (*FRAMES_VQA, *GQA):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-000000.tar").write_bytes(b"")
    return tmp_path


def test_groups_are_those_of_the_paper():
    assert tuple(name for name, suite in FRAMES_VQA.items() if suite.group == "near") == NEAR
    assert tuple(name for name, suite in FRAMES_VQA.items() if suite.group == "far") == FAR
    assert [suite.group for suite in GQA.values()] == ["id", "near"]
    assert [name for name, suite in DOMAINNET.items() if suite.group == "near"] == [
        "domainnet_sketch", "domainnet_painting", "domainnet_infograph", "domainnet_clipart",
    ]  # fmt: skip
    assert {suite.metric for suite in DOMAINNET.values()} == {"top1"}
    assert {suite.metric for suite in FRAMES_VQA.values()} == {"vqa/official"}
    assert list(REGISTRIES) == ["frames-vqa", "gqa", "domainnet", "quickstart"]
    names = [name for registry in REGISTRIES.values() for name in registry]
    assert len(set(names)) == len(names)
    for registry in REGISTRIES.values():
        for suite in registry.values():
            assert suite.description.endswith(".")
            assert suite.title
            assert suite.benchmark == registry.benchmark
            assert bool(suite.files) == bool(suite.command) == (suite.benchmark != "quickstart")


def test_averages_are_those_of_the_authors_dump():
    means = averages(DUMP, list(FRAMES_VQA.values()))
    assert means["near"] == pytest.approx(75.08, abs=0.005)
    assert means["far"] == pytest.approx(37.77, abs=0.005)
    assert means["ood"] == pytest.approx(62.64, abs=0.005)


def test_a_part_of_a_benchmark_has_no_average_of_fewer(folder):
    part = load_suites({"set": "frames-vqa", "only": ["vqav2", "iv_vqa", *FAR]}, folder)
    means = averages({suite.name: DUMP[suite.name] for suite in part}, part)
    assert means["near"] is means["ood"] is means["all"] is None
    assert means["far"] == pytest.approx(37.77, abs=0.005)
    assert average_members(part)["near"] == NEAR


def test_benchmarks_are_never_averaged_together(folder):
    both = load_suites({"set": ["frames-vqa", "gqa"]}, folder)
    means = averages({**DUMP, "gqa": 60.0, "gqa_ood": 50.0}, both)
    assert means["frames-vqa:near"] == pytest.approx(75.08, abs=0.005)
    assert means["frames-vqa:ood"] == pytest.approx(62.64, abs=0.005)
    assert (means["gqa:near"], means["gqa:all"]) == (50.0, 55.0)
    assert "near" not in means
    assert "gqa:far" not in means
    own = {"mine": {"group": "near", "shift": "vision", "shards": ["x.tar"]}}
    with_own = load_suites({"set": "frames-vqa", "custom": own}, folder)
    assert averages({**DUMP, "mine": 1.0}, with_own)["frames-vqa:near"] == pytest.approx(75.08, abs=0.005)
    assert averages({**DUMP, "mine": 1.0}, with_own)["custom:near"] == 1.0
    # Unless the user says that it belongs there.
    own["mine"]["benchmark"] = "frames-vqa"
    joined = load_suites({"set": "frames-vqa", "custom": own}, folder)
    assert averages({**DUMP, "mine": 1.0}, joined)["near"] == pytest.approx((6 * 75.075 + 1.0) / 7, abs=0.005)


def test_shards_are_found_and_the_metric_is_replaced(folder):
    suites = load_suites({"set": ["frames-vqa", "gqa"], "folder": str(folder), "metric": "vqa/lavis"})
    assert [suite.name for suite in suites] == [*FRAMES_VQA, *GQA]
    assert suites[3].shards == (str(folder / "vqa_rephrasings"),)
    assert [suite.metric for suite in suites] == ["vqa/lavis"] * 10 + ["exact"] * 2


def test_a_missing_suite_is_an_error_or_visibly_missing(folder):
    (folder / "vqa_ce" / "shard-000000.tar").unlink()
    section = {"set": "frames-vqa", "folder": str(folder)}
    with pytest.raises(SuiteError) as error:
        load_suites(section)
    message = str(error.value)
    assert message.startswith(f"no shards of vqa_ce: expected *.tar in {folder}/vqa_ce. Write them with `scale-digrap ")
    assert "shards write vqa --questions v2_OpenEnded_mscoco_val2014_questions.json" in message
    assert "counterexamples.json, pictures: COCO val2014; or set suites.missing: allow" in message
    suites = load_suites({**section, "missing": "allow"})
    assert [suite.name for suite in suites if suite.missing] == ["vqa_ce"]
    scores = {suite.name: 0.5 for suite in suites if not suite.missing}
    assert averages(scores, suites) == {"near": None, "far": 0.5, "ood": None, "all": None}
    with pytest.raises(SuiteError, match="no shards of gqa, gqa_ood"):  # nothing at all is left
        load_suites({"set": "gqa", "missing": "allow", "folder": "nowhere"})
    with pytest.raises(SuiteError, match=r"expected \*\.tar in FOLDER/gqa, suites\.folder"):
        load_suites({"set": "gqa"})


def test_a_suite_of_the_users_own_needs_no_code(tmp_path):
    write_shards([sample(number) for number in range(7)], tmp_path / "mine")
    section = OmegaConf.to_container(
        OmegaConf.create(
            f"""
            custom:
              mine: {{group: id, shift: none, shards: ["{tmp_path}/mine/*.tar"], expected: 7, metric: exact}}
              other: {{group: far, shift: skill, shards: {tmp_path}/mine, title: Other, description: Mine again.}}
            """
        )
    )
    mine, other = load_suites(section)
    assert (mine.metric, mine.group, mine.expected, mine.heading) == ("exact", "id", 7, "mine")
    assert (other.metric, other.shift, other.heading, other.shards) == (
        "vqa/official",
        "skill",
        "Other",
        (f"{tmp_path}/mine",),
    )
    assert len(ShardDataset(mine.shards)) == len(ShardDataset(other.shards)) == 7
    assert averages({"mine": 0.25, "other": 0.75}, [mine, other])["all"] == 0.5


def test_counts_are_compared_and_can_be_accepted(folder):
    section = {"set": "frames-vqa", "folder": str(folder)}
    suites = {suite.name: suite for suite in load_suites(section)}
    suites["vqav2"].check_count(214_354)
    suites["iv_vqa"].check_count(119_907)  # not known: any number but none
    with pytest.raises(SuiteError, match=r"'iv_vqa' has no questions"):
        suites["iv_vqa"].check_count(0)
    with pytest.raises(
        SuiteError, match=r"'okvqa' has 5000 questions, expected 5046.*may be wrong.*okvqa: \{expected: 5000\}"
    ):
        suites["okvqa"].check_count(5000)
    with pytest.raises(SuiteError) as error:
        suites["vqav2"].check_count(1)
    assert "may be wrong" not in str(error.value)
    accepted = load_suites({**section, "custom": {"okvqa": {"expected": 5000}, "vqav2": {"expected": None}}})
    changed = {suite.name: suite for suite in accepted}
    changed["okvqa"].check_count(5000)
    changed["vqav2"].check_count(1)
    assert [suite.name for suite in accepted] == list(FRAMES_VQA)
    assert changed["okvqa"].shards == suites["okvqa"].shards


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, r"no suites: name a set in suites\.set \(frames-vqa, gqa, domainnet, quickstart\)"),
        ({"sets": "gqa"}, "suites: unknown key sets"),
        ({"set": "vqa"}, "no set named 'vqa'"),
        ({"set": ["gqa", "gqa"]}, "gqa, gqa_ood would be evaluated twice"),
        ({"set": "gqa", "only": ["gqa", "gqaood"]}, "suites.only names gqaood; there are: gqa, gqa_ood"),
        ({"set": "gqa", "missing": "skip"}, "suites.missing must be error or allow, got 'skip'"),
        ({"set": "gqa", "metric": "exact"}, "suites.metric must be one of vqa/official, vqa/lavis, got 'exact'"),
        ({"custom": ["a"]}, "suites.custom must map names"),
        ({"custom": {"a": "x.tar"}}, "suites.custom.a must be a section"),
        ({"custom": {"a": {"shards": "x.tar"}}}, "suites.custom.a lacks group, shift"),
        ({"custom": {"a": {"group": "id", "shift": "none"}}}, "lacks shards"),
        (
            {"custom": {"a": {"group": "id", "shift": "none", "shards": "x", "count": 3}}},
            "unknown key count; known: group",
        ),
        ({"custom": {"a": {"group": "mid", "shift": "none", "shards": "x"}}}, "group must be one of id, near, far"),
        ({"custom": {"a/b": {"group": "id", "shift": "none", "shards": "x"}}}, "becomes a file name"),
        (
            {"custom": {"a": {"group": "id", "shift": "none", "shards": "x", "expected": "7"}}},
            "expected must be a number",
        ),
        (
            {"set": "gqa", "custom": {"gqa": {"group": "far"}}},
            r"unknown key group.*of a built-in suite the rest is fixed",
        ),
    ],
)
def test_sections_that_make_no_sense(section, words):
    with pytest.raises(SuiteError, match=words):
        load_suites(section)


def test_from_official_files_to_suites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in GQA:
        official.MAKERS[name](tmp_path)
        assert main(["shards", "write", *GQA[name].command.split(), "--to", f"suites/{name}"]) == 0
    gqa, ood = load_suites({"set": "gqa", "folder": "suites"})
    assert (len(ShardDataset(gqa.shards)), len(ShardDataset(ood.shards))) == (2, 3)
    with pytest.raises(SuiteError, match="'gqa_ood' has 3 questions, expected 2796"):
        ood.check_count(3)


def test_the_documentation_has_every_suite_as_it_is():
    text = (Path(__file__).parents[2] / "docs" / "suites.md").read_text(encoding="utf-8")
    for suite in (one for registry in REGISTRIES.values() for one in registry.values() if one.command):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{suite.name}` |")]
        assert f"| `{suite.command}` |" in row
        assert f"| {'ID' if suite.group == 'id' else f'{suite.group}, {suite.shift}'} |" in row
        if suite.expected is not None:
            assert f"| {suite.expected:,}{'' if suite.verified else ' ?'} |" in row
        else:
            assert "| ~" in row
