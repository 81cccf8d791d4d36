"""What is saved is what is loaded, and nothing else stands in the folder."""

import dataclasses
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import ejax
from ejax import bundle as bundle_module
from ejax import saving, storage
from ejax.bundle import load_bundle
from ejax.bundle_files import FILES, ledger_behind
from ejax.card import describe_thresholds
from ejax.classifier import EarlyExitClassifier
from ejax.data.sources import Example, row_hash
from ejax.data.tokenizer import Tokenizer
from ejax.errors import UserError
from ejax.evaluation.labelled import labelled_rows
from ejax.models.weights import load_bert
from ejax.provenance import ON_WORD, PICKED, TRAINED, UNKNOWN, UNKNOWN_BEHIND, Ledger
from ejax.saving import save_bundle

GOLDENS = Path(__file__).parent / "goldens"


def test_round_trip_is_exact(tmp_path: Path) -> None:
    never = load_bundle(tiny.trained()[0])
    assert never.abstain == 0
    first = dataclasses.replace(never, abstain=0.625)
    save_bundle(first, tmp_path / "copy")
    second = load_bundle(tmp_path / "copy")
    assert second.abstain == 0.625
    jax.tree.map(np.testing.assert_array_equal, first.variables, second.variables)
    for field in ("cfg", "exits", "labels", "temperatures", "thresholds", "max_length", "buckets"):
        assert getattr(first, field) == getattr(second, field), field
    assert first.provenance == second.provenance
    assert first.ledger == second.ledger
    text = ["the film was great"]
    assert (
        first.tokenizer.encode(text, 16).ids.tolist()
        == second.tokenizer.encode(text, 16).ids.tolist()
    )


def test_rows_behind_the_weights_are_kept_when_training_goes_on(tmp_path: Path) -> None:
    first = tiny.trained()[0]
    args = tiny.train_args(tmp_path / "more")
    args[args.index("--model") + 1] = first
    args[args.index("--train") + 1] = tiny.write_tsv(tmp_path / "new.tsv", tiny.rows(24, 90))
    dev = args.index("--dev") + 1
    args[dev] = tiny.file("train")
    assert f"every row of dev-A is in train, or trained {first}" in tiny.refused(*args)
    labelled, hashes = dev_rows(first)
    dev_a = load_bundle(first).ledger.among(hashes, ["dev_a"])
    picked = [row for row, name in zip(labelled, hashes, strict=True) if name in dev_a]
    # The last are the first of train.
    mixed = [*tiny.rows(41, 91, wrong=7), *picked[:8], *tiny.rows(4, 0)]
    args[dev] = tiny.write_tsv(tmp_path / "dev.tsv", mixed)
    args[args.index("--test") + 1] = args[dev]  # of which dev-A proves nothing either
    done = tiny.ejax(*args)
    assert done.code == 0
    ledger = load_bundle(tmp_path / "more").ledger
    behind, own = ledger.trainings
    assert behind.rows == {
        "train": tiny.rows_of(load_bundle(first))["train"],
        "picked": behind.held(["picked"]),
    }
    assert ledger.among(hashes, ["picked"]) == dev_a
    assert own.rows["test"]
    assert own.rows["test"] == own.rows["dev_b"]
    left_out = sum(map(int, re.findall(r"(\d) rows of dev-[AB] are left out", done.err)))
    assert 4 < left_out < 12  # some of those that picked the first weights fell into dev-B
    assert not ledger.among(dev_a, ["dev_b"])
    sentence = tiny.refused(
        "thresholds", tmp_path / "more", "--budget", 0.5, "--data", tiny.file("train")
    )
    assert "every row of data/train.tsv" in sentence
    chose = tiny.write_tsv(tmp_path / "chose.tsv", picked)
    ask = ("thresholds", tmp_path / "more", "--budget", 0.5, "--data", chose)
    assert "every row of" in tiny.refused(*ask)


def dev_rows(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(label, text) of the tiny dev set, and the rows' hashes."""
    rows = list(labelled_rows(load_bundle(folder), str(tiny.file("dev"))))
    return [(("bad", "good")[row.label], row.text) for row in rows], [row_hash(row) for row in rows]


@pytest.mark.filterwarnings("always::ejax.training.checks.Doubt")
def test_training_on_from_weights_without_their_rows_says_so(tmp_path: Path) -> None:
    folder = without_rows(tmp_path)
    args = tiny.train_args(tmp_path / "more")
    args[args.index("--dev") + 1] = tiny.file("train")  # refused right after
    started = [*args]
    started[started.index("--model") + 1] = folder
    for asked, said in ((args, False), (started, True), ([*args, "--teacher", folder], True)):
        done = tiny.ejax(*asked)
        assert done.code == 2
        assert (UNKNOWN_BEHIND in done.err) == said
    assert not ledger_behind(folder).with_training({"train": ["0" * 12]}).complete
    assert ledger_behind(tiny.model()).with_training({"train": ["0" * 12]}).complete
    (folder / "exits.json").unlink()  # the weights alone
    assert not ledger_behind(folder).complete


def without_rows(folder: Path) -> Path:
    clf = EarlyExitClassifier(load_bundle(tiny.trained()[0]))
    return clf.save_pretrained(folder / "shared", rows=False)


def test_rows_json_alone_tells_what_was_trained_on() -> None:
    folder = tiny.trained()[0]
    bundle = load_bundle(folder)
    texts = [line.split("\t")[1] for line in tiny.file("train").read_text().splitlines()[1:]]
    train = {row_hash(Example(text, None, 0)) for text in texts}
    unsalted = train.union(dev_rows(folder)[1])
    assert bundle.ledger.among(unsalted, TRAINED) == train
    salted = tiny.rows_of(bundle)["train"]
    assert len(salted) == len(train)
    for path in folder.iterdir():
        content = path.read_text("latin-1")
        assert not [row for row in unsalted if row in content], path
        assert all((row in content) == (path.name == "rows.json") for row in salted), path
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    again = bundle.ledger.behind().with_training({"train": train})  # of the same rows
    assert not again.trainings[1].rows["train"] & salted


def test_a_start_that_is_its_own_teacher_is_one_training() -> None:
    rows = [f"{i:012x}" for i in range(9)]
    first = Ledger(complete=True).with_training({"train": rows[:4], "dev_a": rows[4:6]})
    used = first.with_rows("calibration", rows[6:8])
    teacher = used.behind(picked=[*PICKED, "calibration"])
    both = first.behind().merged(teacher).with_training({"train": rows[8:]})
    assert both.complete
    assert len(both.trainings) == 2
    assert both.among(rows, TRAINED) == {*rows[:4], *rows[8:]}
    assert both.among(rows, ["picked"]) == {*rows[4:8]}
    assert Ledger.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert not first.merged(Ledger()).complete


def test_without_rows_json_what_needs_it_refuses_and_the_rest_says_so(tmp_path: Path) -> None:
    folder = without_rows(tmp_path)
    assert "rows.json" not in os.listdir(folder)
    assert load_bundle(folder).provenance == load_bundle(tiny.trained()[0]).provenance
    train, dev = ("--data", tiny.file("train")), ("--data", tiny.file("dev"))
    for ask in (
        ("calibrate", folder, *dev),
        ("thresholds", folder, *dev, "--risk", 0.5),
        ("thresholds", folder, *dev, "--max-drop", 5, "--delta", 0.5),
    ):
        sentence = tiny.refused(*ask)
        assert "needs to know which rows trained this bundle" in sentence
        assert "give --rows-are-new (rows_are_new=True)" in sentence
    for ask in (
        ("thresholds", folder, *train, "--budget", 0.5, "--output", tmp_path / "budget"),
        ("evaluate", folder, *train, "--repeats", 1, "--output", tmp_path / "e.json"),
        ("report", folder, *train, "--repeats", 1, "--output", tmp_path / "r.html"),
    ):
        split = ("--split", "dev") if ask[0] != "evaluate" else ()
        done = tiny.ejax(*ask, *split)
        assert done.code == 0, done.err
        assert UNKNOWN in " ".join(done.err.split())
    assert UNKNOWN in (tmp_path / "budget" / "README.md").read_text()
    told = tiny.ejax("calibrate", folder, *dev, "--rows-are-new")
    assert told.code == 0, told.err
    assert ON_WORD in load_bundle(folder).provenance["thresholds_from"]
    # Those rows are known from now on, and that others are not is known as well.
    ask = ("thresholds", folder, *dev, "--risk", 0.5)
    assert "--rows-are-new" in tiny.refused(*ask)
    assert "dev.tsv fitted this bundle" in tiny.refused(*ask, "--rows-are-new")
    ask = ("thresholds", folder, "--data", tiny.file("test"), "--risk", 0.5, "--rows-are-new")
    done = tiny.ejax(*ask)
    assert done.code == 0, done.err
    assert ON_WORD in " ".join(done.err.split())


def test_rows_that_are_known_are_new_to_nobody() -> None:
    ask = ("calibrate", tiny.trained()[0], "--data", tiny.file("train"), "--rows-are-new")
    assert "were neither trained on nor" in tiny.refused(*ask)


def test_weights_and_rows_of_another_bundle_are_told(tmp_path: Path) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1  # one bit of one number
    (folder / "model.safetensors").write_bytes(weights)
    assert tiny.refused("predict", folder, "--input", tiny.file("test")) == (
        f"{folder / 'model.safetensors'} is damaged or of another bundle: its sha256 is not that "
        f"in exits.json. Save or copy the bundle again."
    )
    bundle = load_bundle(tiny.trained()[0])
    other = jax.tree.map(lambda leaf: leaf + 1, bundle.variables)
    save_bundle(dataclasses.replace(bundle, variables=other), folder)
    shutil.copy(tiny.trained()[0] / "rows.json", folder)
    with pytest.raises(ValueError, match=r"rows.json is not of these weights: put back the one"):
        load_bundle(folder)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_bundles_of_older_formats_answer_as_they_did(tmp_path: Path, version: int) -> None:
    folder = GOLDENS / f"bundle_format_{version}"
    assert json.loads((folder / "exits.json").read_text())["format_version"] == version
    said = "before you share it" + (
        r"\. Which rows it was .* is not known" if version == 1 else r"\.$"
    )
    with pytest.warns(UserWarning, match=f"{folder.name}: an older ejax made it.*{said}"):
        bundle = load_bundle(folder, dtype="float32")
    golden = json.loads((folder / "answers.json").read_text())
    texts = golden["texts"]
    answers = EarlyExitClassifier(bundle)([text for part in texts.values() for text in part])
    for answer, expected in zip(answers, golden["answers"], strict=True):
        assert answer == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}
    hashes = {
        name: {row_hash(Example(text, None, 0)) for text in part} for name, part in texts.items()
    }
    known = version > 1
    assert bundle.ledger.complete == known
    of_train = bundle.ledger.among({*hashes["train"], *hashes["test"]}, TRAINED)
    assert of_train == (hashes["train"] if known else set())
    of_dev = bundle.ledger.among(hashes["dev"], ["dev_a", "dev_b"])
    assert of_dev == (hashes["dev"] if known else set())
    save_bundle(bundle, tmp_path / "new")
    again = load_bundle(tmp_path / "new")  # without a warning
    assert again.ledger == bundle.ledger
    for name in ("model.safetensors", "exits.json"):
        content = (tmp_path / "new" / name).read_bytes()
        assert b"texts.train" not in content
        assert not [row for part in hashes.values() for row in part if row.encode() in content]
    if not known:
        ask = ("calibrate", tmp_path / "new", "--data", tiny.file("dev"))
        assert "--rows-are-new" in tiny.refused(*ask)


def test_the_folder_holds_only_plain_files(tmp_path: Path) -> None:
    folder = save_bundle(load_bundle(tiny.trained()[0]), tmp_path / "copy")
    assert sorted(os.listdir(folder)) == sorted((*FILES, "rows.json", "README.md"))
    assert os.listdir(tmp_path) == ["copy"]  # no temporary folder is left
    assert (folder / "model.safetensors").stat().st_mode & 0o044
    card = (folder / "README.md").read_text()
    assert "exits after layers 1, 3" in card
    assert "lose at most 0.5 points" in card
    assert "`rows.json`, where it is there, holds salted hashes of the texts that trained" in card
    assert "Exit 0's table" not in card  # it has none


def test_hugging_face_names_the_encoder_and_labels() -> None:
    folder = tiny.trained()[0]
    names = load_file(folder / "model.safetensors")
    assert "bert.encoder.layer.2.attention.self.query.weight" in names
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    cfg, bert = load_bert(folder, dtype="float32")  # the heads are other heads to it
    assert cfg.num_hidden_layers == 3
    ours = load_bundle(folder).variables["params"]["bert"]
    np.testing.assert_array_equal(
        bert["layers"]["query"]["kernel"], ours["layers"]["query"]["kernel"]
    )


def test_a_signal_while_a_bundle_is_replaced_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    """Where two folders cannot take each other's name at once."""
    bundle, rename = load_bundle(tiny.trained()[0]), Path.rename
    folder = save_bundle(bundle, tmp_path / "b")

    def interrupted(self: Path, target: Path) -> None:
        rename(self, target)
        if self == folder:
            raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(dataclasses.replace(bundle, thresholds=(0.75, 0.0)), folder)
    assert load_bundle(folder).thresholds == bundle.thresholds
    assert os.listdir(tmp_path) == ["b"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Its bundle is found by whoever reads, and put back by whoever saves."""
    bundle = load_bundle(tiny.trained()[0])
    folder = save_bundle(bundle, tmp_path / "b")
    (folder / "notes.txt").write_text("of mine")
    old = folder.rename(tmp_path / ".b-01234_ab-old")
    sentence = tiny.refused("predict", folder)
    assert f"b does not exist. What was there before it was to be replaced is {old}" in sentence
    save_bundle(dataclasses.replace(bundle, thresholds=(0.75, 0.0)), folder)
    assert load_bundle(folder).thresholds == (0.75, 0.0)
    assert (folder / "notes.txt").read_text() == "of mine"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_bundle_is_never_half_old_half_new(tmp_path: Path, monkeypatch, at_once: bool) -> None:
    """While it is read it is replaced again and again, by other weights and labels."""
    if not at_once:
        monkeypatch.setattr(saving, "_exchange", lambda *_: False)
    bundle, done, saved = load_bundle(tiny.trained()[0]), threading.Event(), []
    folder = save_bundle(bundle, tmp_path / "b")
    other = dataclasses.replace(
        bundle, labels=("no", "yes"), thresholds=(0.75, 0.0),
        variables=jax.tree.map(lambda leaf: leaf + 1, bundle.variables),
    )  # fmt: skip

    def write() -> None:
        while not done.is_set():
            saved.append(save_bundle((other, bundle)[len(saved) % 2], folder))

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(write)
        for _ in range(40):
            found = load_bundle(folder)
            same = other if found.labels == other.labels else bundle
            assert found.thresholds == same.thresholds
            jax.tree.map(np.testing.assert_array_equal, found.variables, same.variables)
        done.set()
        writing.result()
    assert len(saved) > 3
    assert os.listdir(tmp_path) == ["b"]


def test_what_was_opened_is_read_to_its_end(tmp_path: Path, monkeypatch) -> None:
    bundle, read = load_bundle(tiny.trained()[0]), bundle_module.read_tokenizer
    folder = save_bundle(bundle, tmp_path / "b")

    def overtaken(path: Path, name: Path) -> Tokenizer:
        save_bundle(dataclasses.replace(bundle, thresholds=(0.75, 0.0)), folder)
        return read(path, name)

    def edited(path: Path, name: Path) -> Tokenizer:
        (folder / "config.json").write_text("{}")
        return read(path, name)

    monkeypatch.setattr(bundle_module, "read_tokenizer", overtaken)
    assert load_bundle(folder).thresholds == bundle.thresholds
    monkeypatch.setattr(bundle_module, "read_tokenizer", edited)
    with pytest.raises(ValueError, match=r"b is being written at this moment: try again"):
        load_bundle(folder)


def test_a_system_that_does_not_name_open_files_reads_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", tmp_path / "none")
    found, wanted = load_bundle(tiny.trained()[0]), ledger_behind(tiny.trained()[0])
    assert found.ledger.behind() == wanted
    with pytest.raises(UserError, match="nothing does not exist"):
        load_bundle(tmp_path / "nothing")


def test_an_encoder_above_the_last_exit_is_cut(tmp_path: Path) -> None:
    bundle = load_bundle(tiny.trained()[0])
    exits = ejax.ExitConfig((1, 2), 2)
    model = ejax.EarlyExitBert(bundle.cfg, exits)
    variables = jax.jit(model.init)(jax.random.key(0), ejax.Batch([[1, 2]]))
    variables = ejax.with_pretrained(variables, bundle.variables["params"]["bert"])
    cut = dataclasses.replace(
        bundle, exits=exits, variables=variables, temperatures=(1.0, 2.0),
        cfg=dataclasses.replace(bundle.cfg, num_hidden_layers=2),
    )  # fmt: skip
    save_bundle(cut, tmp_path / "cut")
    assert not any("layer.2." in name for name in load_file(tmp_path / "cut" / "model.safetensors"))
    assert load_bundle(tmp_path / "cut").cfg.num_hidden_layers == 2


def test_saving_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    bundle = load_bundle(tiny.trained()[0])
    save_bundle(bundle, tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("of mine")
    save_bundle(dataclasses.replace(bundle, thresholds=(0.75, 0.0)), tmp_path / "b")
    assert load_bundle(tmp_path / "b").thresholds == (0.75, 0.0)
    assert (tmp_path / "b" / "notes.txt").read_text() == "of mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not a bundle"):
        save_bundle(bundle, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "current").symlink_to("b")
    save_bundle(bundle, tmp_path / "current")
    assert load_bundle(tmp_path / "b").thresholds == bundle.thresholds
    assert sorted(os.listdir(tmp_path)) == ["b", "current", "mine"]
    assert (tmp_path / "current").is_symlink()


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("exits.json", {"provenance": None}, "provenance must be an object. Got None"),
        ("exits.json", {"buckets": ["a"]}, "buckets[0] must be an integer. Got 'a'"),
        ("exits.json", {"abstain": 1.5}, "an abstain threshold from 0 to 1, or none. Got 1.5"),
        ("exits.json", {"max_length": 4096}, "at least 4 and at most the 32 positions"),
        ("exits.json", {"sha256": ""}, "its sha256 is not that in exits.json"),
        ("rows.json", {"trainings": [{}]}, "trainings[0].salt is missing"),
        (
            "rows.json",
            {"trainings": [{"salt": "", "rows": {"train": "0"}}]},
            "rows.json is damaged",
        ),
        ("exits.json", {"temperatures": [1e-45, 1.0]}, "temperatures from 0.001 to 1000, one per"),
        ("exits.json", {"temperatures": [1.0, 1e38]}, "temperatures from 0.001 to 1000, one per"),
        ("exits.json", {"ngram_buckets": 1 << 40}, "a power of two, at most 2^24"),
        ("exits.json", {"format_version": True}, "a format_version of at most 4. Got True"),
        ("exits.json", {"sha256": {"a": "b" * 10**7}}, "sha256 must be a string. Got {'a': 'bbb"),
        ("exits.json", {"provenance": {"versions": 3}}, "provenance.versions must be an object"),
        ("config.json", {"id2label": {"0": "a", "1": "a"}}, "the names of the labels, each once"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "the names of the labels, each once"),
        ("config.json", {"id2label": {"0": 1, "1": None}}, "the names of the labels, each once"),
        ("config.json", {"id2label": ["x" * 10**7]}, "the names of the labels, each once"),
        ("config.json", {"num_hidden_layers": 1}, "exit layers must be at most 1"),
        ("config.json", {"vocab_size": 10**12}, "must be (1000000000000, 20). Got (19, 20)"),
        ("config.json", {"id2label": None}, "config.json: id2label must map 0, 1, … to the names"),
        ("config.json", {"vocab_size": 9}, "word"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, changed: object, said: str) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    content = json.loads((folder / name).read_text()) | changed
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(str(folder))) as raised:
        load_bundle(folder)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("text", ["1e999", "NaN", "1" * 400, "[" * 1100 + "]" * 1100, '"", "a": 1'])
def test_json_that_no_program_should_read(tmp_path: Path, text: str) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    for name in ("exits.json", "config.json", "rows.json"):
        before = (folder / name).read_text()
        (folder / name).write_text(before.replace("{", f'{{"a": {text}, ', 1))
        with pytest.raises(UserError, match=f"{name} is damaged: it is n") as raised:
            load_bundle(folder)
        assert len(str(raised.value)) < 500
        (folder / name).write_text(before)


@pytest.mark.filterwarnings("ignore:.*an older ejax made it")
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("heads.mix", lambda x: x.astype(np.int32), "finite float32. Got int32"),
        ("heads.exits.classifier.bias", lambda x: x * np.nan, "float32. Got NaN or infinity"),
        ("heads.exits.dense.bias", lambda x: x[:, 1:].copy(), "missing or of another shape"),
        ("ngrams.table", lambda x: x.astype(np.float64), "ngrams.table is missing, not finite, or"),
        ("ngrams.known", lambda x: x[::-1].copy(), "ngrams.known is missing"),
        ("ngrams.known", lambda x: x.astype(np.int64), "ngrams.known is missing"),
        ("ngrams.bias", lambda x: x + np.inf, "ngrams.bias is missing, not finite"),
        ("bert.embeddings.word_embeddings.weight", lambda x: x * np.nan, "not finite: embeddings."),
        ("texts.train", lambda x: x.astype(np.float32), "texts.train must be a list of int64"),
    ],
)
def test_tensors_of_another_kind_are_named(tmp_path: Path, name: str, change, said: str) -> None:
    """In a format without a sha256 that would tell."""
    folder = Path(shutil.copytree(GOLDENS / "bundle_format_3", tmp_path / "b"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(str(folder / "model.safetensors"))) as raised:
        load_bundle(folder)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["exits.json", "config.json"])
def test_a_bundle_that_was_edited_loads_and_says_so(tmp_path: Path, name: str) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    edit = {"thresholds": [0.9, 0.0]} if name == "exits.json" else {"hidden_act": "relu"}
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | edit))
    with pytest.warns(UserWarning, match=f"bundle: {name} changed after the bundle was saved"):
        bundle = load_bundle(folder)
    save_bundle(bundle, folder)
    load_bundle(folder)  # without a warning


@pytest.mark.parametrize("field", ["temperatures", "layers"])
def test_exits_that_do_not_fit_the_weights_are_named(tmp_path: Path, field: str) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    meta = json.loads((folder / "exits.json").read_text())
    meta[field] = {"temperatures": [1.0], "layers": [1, 2, 3]}[field]
    (folder / "exits.json").write_text(json.dumps(meta))
    with pytest.raises(
        ValueError, match=r"temperatures must be 2 positive|does not fit exits.json"
    ):
        load_bundle(folder)


def test_thresholds_near_one_are_told_apart():
    assert describe_thresholds((0.5, 0.9996, 0.99999, 2.0, 0.0)) == "0.500, 0.9996, 0.99999, none"
    assert describe_thresholds((0.9999996, 0.9999996, 0.0)) == "0.9999996"
