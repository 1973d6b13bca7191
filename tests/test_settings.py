"""Settings: a value is what its field's type says, whatever YAML would make of it; secrets and ``~``; the messages."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

from scale_digrap.config import Config, ConfigError, config_from_dict, config_to_yaml, load_config, save_config
from scale_digrap.evaluation.evaluate_config import EvaluateConfig, load_evaluate_config
from scale_digrap.evaluation.registry import load_suites
from scale_digrap.launch.spec import LaunchConfig, load_spec
from scale_digrap.settings import (
    Interpolated,
    PathText,
    complete,
    read_structured,
    read_values,
    read_yaml,
    shown,
    to_yaml,
)

TEXTS = (
    "003000", "7e12345", "1e5", "2026_11_30", "3:50:00", "24:00:00", "2026-11-30", "2026-11-30T10:00:00Z", "0x10",
    "0o17", "017", "1_000", "on", "off", "yes", "no", "Yes", "NO", "true", "False", "y", "n", ".inf", ".nan", "-.5",
    "+1", "1.", "=", "<<", "1.10", "0b11", "nan",
)  # fmt: skip
"""What YAML 1.1 takes for something else than text."""

ONLY_OVERRIDES = ("Q: {question} # x", " both ", "a: b", "[a", "{a", "a}", "- a", "* a", "&a", "!a", "%a", "@a", "`a", "'a", "|", ">", "#", "a#b", ", a", "? a", '"a" b', "'a' or 'b'")  # fmt: skip  # noqa: E501
"""What a file must put in quotes, and the command line must not."""


@dataclasses.dataclass(kw_only=True)
class Inner:
    text: str = "x"
    maybe: str | None = None


@dataclasses.dataclass(kw_only=True)
class Outer:
    text: str = "x"
    maybe: str | None = None
    texts: list[str] = dataclasses.field(default_factory=list)
    by_name: dict[str, str] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)
    inners: dict[str, Inner] = dataclasses.field(default_factory=dict)
    listed: list[Inner] = dataclasses.field(default_factory=list)
    either: str | list[str] | None = None
    number: int = 0
    ratio: float = 0.0
    switch: bool = False
    place: PathText = "."
    places: list[PathText] = dataclasses.field(default_factory=list)
    anything: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(overrides=(), path=None) -> Outer:
    return read_structured(read_values(path, overrides, Outer), Outer)


def file(tmp_path: Path, text: str, name: str = "a.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [*TEXTS, "null", "~", "Null"])
def test_text_is_what_was_written_in_files_and_on_the_command_line(tmp_path, text):
    found = read(
        [f"text={text}", f"texts=[{text}, b]", f"by_name.a={text}", f"inner.text={text}", f"inners.{1}.text={text}"]
    )
    assert (found.text, found.texts, found.by_name) == (text, [text, "b"], {"a": text})
    assert (found.inner.text, found.inners["1"].text) == (text, text)
    from_file = read(
        path=file(
            tmp_path,
            f"text: {text}\ntexts: [{text}, b]\nby_name: {{{text}: {text}}}\ninner: {{text: {text}}}\n"
            f"inners:\n  {text}: {{text: {text}}}\nlisted:\n- text: {text}  # a comment\neither:\n- {text}\n"
            if text != "<<"
            else "text: <<\ntexts: ['<<', b]\nby_name: {'<<': <<}\ninner: {text: <<}\ninners: {'<<': {text: <<}}\n"
            "listed: [{text: <<}]\neither: [<<]\n",
        )
    )
    assert (from_file.text, from_file.texts, from_file.by_name) == (text, [text, "b"], {text: text})
    assert (from_file.inner.text, from_file.inners[text].text, from_file.listed[0].text) == (text, text, text)
    assert from_file.either == [text]


@pytest.mark.parametrize("text", ONLY_OVERRIDES)
def test_on_the_command_line_text_needs_no_quotes(text):
    found = read([f"text={text}", f"maybe={text}", f"inners.a.text={text}"])
    assert (found.text, found.maybe, found.inners["a"].text) == (text, text, text)


def test_quotes_are_yamls_and_null_is_for_what_may_be_null(tmp_path):
    found = read(["text='003'", 'maybe="null"', "texts=['null', \"~\", null]", "place='a b'"])
    assert (found.text, found.maybe, found.texts, found.place) == ("003", "null", ["null", "~", "null"], "a b")
    for null in ("null", "~", "", "NULL"):
        assert read(["maybe=x", f"maybe={null}"]).maybe is None
        assert read(path=file(tmp_path, f"maybe: {null}\ninner: {{maybe: {null}}}\n")).maybe is None
    assert read(path=file(tmp_path, "maybe: 'null'\ntext: ''\n")) == Outer(maybe="null", text="")


def test_numbers_and_switches_are_still_read_from_text():
    found = read(["ratio=1e-4", "number=0100", "switch=yes"])
    assert (found.ratio, found.number, found.switch) == (1e-4, 100, True)
    assert [read([f"ratio={text}"]).ratio for text in ("1", ".5", "-2.", "1_000", ".inf", "1E3")] == [
        1.0, 0.5, -2.0, 1000.0, float("inf"), 1000.0,
    ]  # fmt: skip
    assert [read([f"number={text}"]).number for text in ("0x10", "-3", "+4", "1_000", "'5'")] == [16, -3, 4, 1000, 5]
    assert [read([f"switch={text}"]).switch for text in ("on", "False", "1", "NO")] == [True, False, True, False]
    for wrong in ("number=1.5", "number=true", "number=1:30", "ratio=1:30", "switch=2", "switch=maybe", "number="):
        with pytest.raises(ConfigError, match=f"^{wrong.partition('=')[0]} must be"):
            read([wrong])


def test_where_no_type_says_what_it_is_only_decimal_numbers_are_numbers():
    found = read(["anything={a: 1, b: 1e-3, c: 003, d: 1:30, e: 2026-11-30, f: no, g: null, h: '1', i: [0x10, x]}"])
    assert found.anything == {
        "a": 1, "b": 1e-3, "c": "003", "d": "1:30", "e": "2026-11-30", "f": False, "g": None, "h": "1", "i": [16, "x"],
    }  # fmt: skip


def texts_of(schema: Any, prefix: str = "") -> list[str]:
    """Overrides that set every setting of a schema that is text, through lists, mappings and sections."""
    found = []
    for name, kind in get_type_hints(schema).items():
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        for one in kinds if float not in kinds else ():
            if one is str:
                found.append(f"{prefix}{name}=%s")
            elif dataclasses.is_dataclass(one):
                found += texts_of(one, f"{prefix}{name}.")
            elif one == list[str]:
                found.append(f"{prefix}{name}=[%s]")
            elif get_origin(one) is list and dataclasses.is_dataclass(get_args(one)[0]):
                inner = [text.replace("=", ": ", 1) for text in texts_of(get_args(one)[0])]
                found += [f"{prefix}{name}=[{{{text}}}]" for text in inner if "." not in text]
            elif get_origin(one) is dict and get_args(one)[1] is str:
                found.append(f"{prefix}{name}.k=%s")
            elif get_origin(one) is dict and get_args(one)[1] is not Any:
                found += texts_of(get_args(one)[1], f"{prefix}{name}.k.")
            elif hasattr(one, "__total__"):
                found += texts_of(one, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("schema", [Config, EvaluateConfig, LaunchConfig])
def test_no_text_setting_of_any_schema_is_read_as_a_number(schema):
    """Every text setting of every schema, found by its type, keeps every text that YAML would take for a number."""
    overrides = texts_of(schema)
    assert len(overrides) > 20
    for override in overrides:
        for text in ("003000", "7e12345", "2026_11_30", "3:50:00", "no", "2026-11-30"):
            values = read_values(None, [override % text], schema)
            config = read_structured(values, schema)
            value: Any = config
            for part in override.partition("=")[0].split("."):
                value = value[part] if isinstance(value, dict) else getattr(value, part)
            while isinstance(value, list):
                value = value[0]
            if dataclasses.is_dataclass(value):
                value = getattr(value, re.search(r"\{(\w+):", override)[1])
            assert value == text, override


def test_the_settings_that_were_read_as_numbers(tmp_path):
    evaluated = load_evaluate_config(
        None,
        ["models.a.run=runs/a", "models.a.checkpoint=003000", "models.b.path=x", "models.b.revision=7e12345",
         "out=2026_11_30", "suites.custom.c={group: id, shift: none, shards: 2026_11, title: no}"],
    )  # fmt: skip
    assert evaluated.models["a"].checkpoint == "003000"
    assert (evaluated.models["b"].revision, evaluated.out) == ("7e12345", "2026_11_30")
    suite = load_suites(dataclasses.asdict(evaluated.suites))[0]
    assert (suite.title, suite.shards) == ("no", ("2026_11",))
    config = load_config(
        None, ["run_dir=2026_11_30", "model.prompt=Q: {question} # x", "data.classes=[yes, no, null, 007]"]
    )
    assert (config.run_dir, config.model.prompt) == ("2026_11_30", "Q: {question} # x")
    assert config.data.classes == ["yes", "no", "null", "007"]
    with pytest.raises(ConfigError, match=r"training\.max_time: '3:50:00' is no length of time.*3h50m"):
        load_config(None, ["training.max_time=3:50:00"])
    spec = load_spec(
        file(
            tmp_path,
            "nodes: 2:4\nslurm: {time: 24:00:00, account: 0123}\nenvironment: {A: on, B: 012, C: 1e5, D: ~}\n"
            "kubernetes: {cpu: 32, memory: 1e3, node_selector: {gpu: yes}}\n",
        )
    )
    assert (spec.nodes, spec.slurm.time, spec.slurm.account) == ("2:4", "24:00:00", "0123")
    assert spec.environment == {"A": "on", "B": "012", "C": "1e5", "D": "~"}
    assert (spec.kubernetes.cpu, spec.kubernetes.memory, spec.kubernetes.node_selector) == ("32", "1e3", {"gpu": "yes"})


def test_what_is_printed_reads_back_the_same_and_for_other_readers_too(tmp_path):
    for text in (*TEXTS, *ONLY_OVERRIDES, "null", "~", "", "a\nb", "\ttab", "é", "${x}", "\\${x}", "***", "7e5"):
        made = Outer(text=text, texts=[text], by_name={"k": text}, maybe=text)
        printed = to_yaml(shown(made))
        assert read(path=file(tmp_path, printed)) == made, printed
        if "${" not in text:
            assert yaml.safe_load(printed)["text"] == text
            assert OmegaConf.to_container(OmegaConf.load(tmp_path / "a.yaml"))["texts"] == [text]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("texts=a.tar", "texts must be a list, got 'a.tar': write [a.tar]"),
        ("texts=a-{0..3}.tar", "texts must be a list, got 'a-{0..3}.tar': write ['a-{0..3}.tar']"),
        (
            "texts={0..3}.tar",
            "override 'texts={0..3}.tar' is not valid YAML: put text with braces, colons or '#' in it into quotes: "
            "texts=['{0..3}.tar']",
        ),
        ("texts=[a-{0..3}.tar,b.tar]", "into quotes: texts=['a-{0..3}.tar', b.tar]"),
        ("texts=[a-{000..041,050}.tar]", "into quotes: texts=['a-{000..041,050}.tar']"),
        ("texts=[a: b]", "texts.0 must be text, got '{a: b}': put text with braces, brackets, colons"),
        ("texts=[{a}]", "texts.0 must be text, got '{a}'"),
        ("texts=a: b", "texts must be a list, got '{a: b}': write [a, b]"),
        ("texts=null", "texts must be a list, got 'null'"),
        ("by_name=[a,b]", "by_name must map names to values, got '[a, b]': write {NAME: VALUE}"),
        ("by_name=a", "by_name must map names to values, got 'a'"),
        ("inners=[a,b]", "inners must map names to values, got '[a, b]': write {NAME: {text: VALUE}}"),
        ("inners=a", "inners must map names to values, got 'a'"),
        ("inners.a=b", "inners.a is a section with keys text, maybe; got the value 'b'"),
        ("inners={a: [b]}", "inners.a is a section with keys text, maybe; got the value '[b]'"),
        ("listed=a", "listed must be a list, got 'a': write [{text: VALUE}]"),
        ("listed=[a]", "listed.0 is a section"),
        ("inner=a", "inner is a section with keys text, maybe; got the value 'a'"),
        ("inner={text: {a: b}}", "inner.text must be text, got '{a: b}'"),
        ("inner={text: a: b}", "override 'inner={text: a: b}' is not valid YAML: write inner={NAME: VALUE}, and text"),
        ("number=[1]", "number must be a whole number, not a list or section, got '[1]'"),
        ("ratio={a: 1}", "ratio must be a number, not a list or section"),
        ("number=a: b: c", "override 'number=a: b: c' is not valid YAML"),
        ("switch=perhaps", "switch must be true or false, got 'perhaps'"),
        ("texts=[a, [b]]", "texts.1 must be text, got '[b]'"),
        ("text", "override 'text' is not of the form key=value"),
        ("=x", "override '=x' is not of the form key=value"),
        ("a..b=x", "'a..b' is not a key such as optimizer.lr"),
        ("texts[0]=x", "texts must be a list, got '{0: x}'"),
        ("texxt=1", "unknown key 'texxt' (did you mean 'text'?)"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_fix(override, words):
    with pytest.raises(ConfigError) as refused:
        read([override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text: Q: {question}\n", "is not valid YAML in line 1, column 8 (mapping values are not allowed here): text with braces"),  # noqa: E501
        ("text: {question}\n", "text must be text, got '{question}': put text with braces, brackets, colons or '#'"),
        ("texts: [a-{0..3}.tar]\n", "is not valid YAML in line 1"),
        ("text: a\ntext: b\n", "key 'text' is given twice, the second time in line 2"),
        ("text: !!python/object/apply:os.system [id]\n", "text must be text, got '[id]'"),
        ("text: !secret x\n", "the tag '!secret' is not read"),
        ("text: \x01\n", "is not valid YAML"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("- a\n", "must hold key: value pairs at its top level"),
        ("---\na: 1\n---\nb: 2\n", "is not valid YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_named_with_the_line(tmp_path, text, words):
    with pytest.raises(ConfigError) as refused:
        read(path=file(tmp_path, text))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_may_begin_with_a_byte_order_mark_and_other_encodings_are_named(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftext: a\n")
    assert read(path=tmp_path / "bom.yaml").text == "a"
    (tmp_path / "latin.yaml").write_bytes(b"text: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8"):
        read(path=tmp_path / "latin.yaml")
    assert read(path=file(tmp_path, "# nothing\n")) == Outer()
    assert read(path=file(tmp_path, "inner:\n  # text: a\ntexts:\n")) == Outer()


def test_home_is_expanded_in_paths_of_every_schema(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = read(["place=~/a", "places=[~/b, '~', c/~, ~/d e]", "text=~/a"])
    assert (found.place, found.text) == ("/home/me/a", "~/a")
    assert found.places == ["/home/me/b", "/home/me", "c/~", "/home/me/d e"]
    config = load_config(None, ["run_dir=~/run", "model.path=~/m", "checkpoint.resume=~/c", "data.train=[~/t.tar]"])
    assert (config.run_dir, config.model.path, config.checkpoint.resume) == (
        "/home/me/run", "/home/me/m", "/home/me/c",
    )  # fmt: skip
    assert config.data.train == ["/home/me/t.tar"]
    evaluated = load_evaluate_config(
        None,
        ["out=~/o", "models.a.run=~/r", "models.a.base=~/b", "suites.folder=~/s", "models.b.path=~/p",
         "leakage.train=~/t", "suites.custom.x.shards=[~/u]"],
    )  # fmt: skip
    assert (evaluated.out, evaluated.suites.folder) == ("/home/me/o", "/home/me/s")
    assert (evaluated.models["a"].run, evaluated.models["a"].base) == ("/home/me/r", "/home/me/b")
    assert evaluated.leakage["train"] == "/home/me/t"
    assert evaluated.suites.custom["x"]["shards"] == ["/home/me/u"]
    spec = load_spec(file(tmp_path, "logs: ~/l\nworkdir: ~/w\nhostfile: ~/h\npython: ~/v/bin/python\n"))
    assert (spec.logs, spec.workdir, spec.hostfile) == ("/home/me/l", "/home/me/w", "/home/me/h")
    assert spec.python == "/home/me/v/bin/python"
    monkeypatch.setenv("HOME", str(tmp_path))
    file(tmp_path, "text: found\n", "home.yaml")
    assert read_yaml("~/home.yaml")["text"].text == "found"
    with pytest.raises(Exception, match="no home folder is known for '~nobody-of-that-name'"):
        read(["place=~nobody-of-that-name/x"])


# -- interpolations and secrets ----------------------------------------------------------------------------------------

URL = "https://${oc.env:STORE_USER}:${oc.env:STORE_PASSWORD}@host/a.tar?sig=${oc.env:SIG}&v=2"


@pytest.fixture
def secrets(monkeypatch):
    values = {"STORE_USER": "me", "STORE_PASSWORD": "hunter2", "SIG": "5ecret", "MY_TOKEN": "t0ken"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return ("hunter2", "5ecret", "t0ken")


def test_interpolations_work_and_are_stored_as_they_were_written(secrets, monkeypatch, tmp_path):
    config = load_config(
        None,
        [f"data.train=['{URL}']", "run_dir=/runs/${oc.env:STORE_USER}", "model.path=${run_dir}/base",
         "training.seed=${oc.env:SEED,7}", "evaluation.suites.x={shards: '${data.train}'}"],
    )  # fmt: skip
    assert config.data.train == ["https://me:hunter2@host/a.tar?sig=5ecret&v=2"]
    assert (config.model.path, config.training.seed) == ("/runs/me/base", 7)
    assert config.evaluation.suites["x"].shards == config.data.train
    stored = shown(config)
    assert stored["data"]["train"] == [
        "https://${oc.env:STORE_USER}:${oc.env:STORE_PASSWORD}@host/a.tar?sig=${oc.env:SIG}&v=***"
    ]
    assert stored["model"]["path"] == "${run_dir}/base"
    assert stored["evaluation"]["suites"]["x"]["shards"] == "${data.train}"
    text = json.dumps(stored) + config_to_yaml(config)
    assert not any(secret in text for secret in secrets)

    # Copies keep it: settings are replaced, and travel to other processes.
    for same in (dataclasses.replace(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
        assert shown(same) == stored

    # Resolved anew; what cannot be resolved any more stays as it is.
    monkeypatch.setenv("STORE_USER", "other")
    assert config_from_dict(stored, stored=True).run_dir == "/runs/other"
    monkeypatch.delenv("STORE_USER")
    again = config_from_dict(stored, stored=True)
    assert again.run_dir == "/runs/${oc.env:STORE_USER}"
    assert shown(again) == stored
    save_config(config, tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match=r"run_dir='/runs/\$\{oc\.env:STORE_USER\}' cannot be resolved: .*STORE_USER"):
        load_config(tmp_path / "config.yaml")


def test_an_interpolated_value_has_the_type_of_its_setting(monkeypatch):
    monkeypatch.setenv("TEXT", "003000")
    monkeypatch.setenv("NUMBER", "12")
    monkeypatch.setenv("WRONG", "twelve")
    monkeypatch.setenv("LIST", "[a.tar, '3']")
    monkeypatch.setenv("HOME", "/home/me")
    found = read(
        ["text=${oc.env:TEXT}", "number=${oc.env:NUMBER}", "ratio=${number}", "switch=${oc.env:SWITCH,yes}",
         "place=${oc.env:PLACE,'~/x'}", "texts=${oc.decode:${oc.env:LIST}}", "maybe=${inner.maybe}",
         "anything={a: '${number}', b: '${oc.env:TEXT}'}"],
    )  # fmt: skip
    assert (found.text, found.number, found.ratio, found.switch) == ("003000", 12, 12.0, True)
    assert (found.place, found.texts, found.maybe) == ("/home/me/x", ["a.tar", "3"], None)
    assert found.anything == {"a": 12, "b": "003000"}
    with pytest.raises(ConfigError, match="number must be a whole number, got 'twelve'"):
        read(["number=${oc.env:WRONG}"])
    for wrong in ("${oc.env:NOT_SET_AT_ALL}", "${no.such}", "${unknown_resolver:x}", "${", "${text"):
        with pytest.raises(ConfigError, match=r"^text='\$\{.*cannot be resolved: ") as refused:
            read([f"text={wrong}"])
        assert "\n" not in str(refused.value)


def test_secrets_are_masked_wherever_a_configuration_is_shown(secrets):
    config = read(
        [
            "places=['https://me:hunter2@host/a.tar', 's3://b/c?X-Amz-Signature=5ecret']",
            "by_name={token: t0ken, access_key: t0ken, region: eu, api_key: '${oc.env:MY_TOKEN}'}",
            "anything={password: hunter2, deep: {secret: [t0ken]}, max_new_tokens: 3}",
            "text=https://me:${oc.env:STORE_PASSWORD}@h ftp://${oc.env:STORE_USER}:hunter2@h ${oc.env:MY_TOKEN,t0ken}",
        ]
    )
    assert config.by_name["api_key"] == "t0ken"
    found = shown(config)
    assert not any(secret in json.dumps(found) for secret in secrets)
    assert found["places"] == ["https://***@host/a.tar", "s3://b/c?X-Amz-Signature=***"]
    assert found["by_name"] == {
        "token": "***", "access_key": "***", "region": "eu", "api_key": "${oc.env:MY_TOKEN}",
    }  # fmt: skip
    assert found["anything"] == {"password": "***", "deep": {"secret": ["***"]}, "max_new_tokens": 3}
    assert found["text"] == "https://me:${oc.env:STORE_PASSWORD}@h ftp://***@h ${oc.env:MY_TOKEN,'***'}"
    whole = complete(config)
    assert whole["by_name"]["token"] == "t0ken"
    assert read_structured(whole, Outer) == config
    for schema in (Config, EvaluateConfig, LaunchConfig):
        assert "***" not in json.dumps(shown(schema()))


def test_errors_name_no_secret(secrets):
    for override in ("number=https://me:hunter2@host", "texts=https://me:hunter2@host?sig=5ecret"):
        with pytest.raises(ConfigError) as refused:
            read([override])
        assert "hunter2" not in str(refused.value)
        assert "5ecret" not in str(refused.value)


def test_only_one_function_turns_a_configuration_into_what_leaves_the_process():
    """``asdict`` of a configuration would hold secrets: no file of the package has one."""
    package = Path(__file__).parents[1] / "scale_digrap"
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(
            r"asdict\((self\.)?config\)|OmegaConf\.(structured|to_yaml)|\b(print|repr)\((self\.)?config\)", line
        )
    ]
    assert found == []


def test_interpolated_text_is_text():
    text = Interpolated("a", "${x}")
    assert (text, f"{text}", json.dumps(text), hash(text), type(str(text))) == ("a", "a", '"a"', hash("a"), str)
