"""What is saved is what is loaded, and nothing else stands in the folder."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import ejax
from ejax import bundle as bundle_module
from ejax.bundle import FILES, describe_thresholds, load_bundle, save_bundle
from ejax.data.sources import row_hash
from ejax.data.tokenizer import Tokenizer
from ejax.evaluation.labelled import labelled_rows
from ejax.models.weights import load_bert


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
    np.testing.assert_array_equal(first.trained_rows, second.trained_rows)
    assert len(first.trained_rows) == len(set(tiny.file("train").read_text().splitlines()[1:]))
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
    picked = dict(zip(*reversed(dev_rows(first)), strict=True))
    picked = [picked[name] for name in load_bundle(first).provenance["rows"]["dev_a"]]
    # The last are the first of train.
    mixed = [*tiny.rows(41, 91, wrong=7), *picked[:8], *tiny.rows(4, 0)]
    args[dev] = tiny.write_tsv(tmp_path / "dev.tsv", mixed)
    args[args.index("--test") + 1] = args[dev]  # of which dev-A proves nothing either
    done = tiny.ejax(*args)
    assert done.code == 0
    rows = load_bundle(tmp_path / "more").provenance["rows"]
    assert rows["test"]
    assert sorted(rows["test"]) == sorted(rows["dev_b"])
    left_out = sum(map(int, re.findall(r"(\d) rows of dev-[AB] are left out", done.err)))
    assert 4 < left_out < 12  # some of those that picked the first weights fell into dev-B
    assert not {*rows["dev_b"]} & {*rows["picked"]}
    sentence = tiny.refused(
        "thresholds", tmp_path / "more", "--budget", 0.5, "--data", tiny.file("train")
    )
    assert "every row of data/train.tsv" in sentence
    chose = tiny.write_tsv(tmp_path / "chose.tsv", picked)
    ask = ("thresholds", tmp_path / "more", "--budget", 0.5, "--data", chose)
    assert "every row of" in tiny.refused(*ask)
    assert len(load_bundle(tmp_path / "more").trained_rows) > len(load_bundle(first).trained_rows)


def dev_rows(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(label, text) of the tiny dev set, and the rows' hashes."""
    rows = list(labelled_rows(load_bundle(folder), str(tiny.file("dev"))))
    return [(("bad", "good")[row.label], row.text) for row in rows], [row_hash(row) for row in rows]


def test_rows_that_an_older_format_recorded_are_not_taken_for_these(tmp_path: Path) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    exits = json.loads((folder / "exits.json").read_text())
    (folder / "exits.json").write_text(json.dumps(exits | {"format_version": 1}))
    with pytest.warns(UserWarning, match="older ejax, which rows it was trained and fitted on"):
        bundle = load_bundle(folder)
    assert "rows" not in bundle.provenance
    save_bundle(bundle, folder)  # in today's format, and known for it still
    with pytest.warns(UserWarning, match="older ejax"):
        load_bundle(folder)


def test_the_folder_holds_only_plain_files(tmp_path: Path) -> None:
    folder = save_bundle(load_bundle(tiny.trained()[0]), tmp_path / "copy")
    assert sorted(os.listdir(folder)) == sorted((*FILES, "README.md"))
    assert os.listdir(tmp_path) == ["copy"]  # no temporary folder is left
    assert (folder / "model.safetensors").stat().st_mode & 0o044
    card = (folder / "README.md").read_text()
    assert "exits after layers 1, 3" in card
    assert "lose at most 0.5 points" in card


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
    bundle, rename = load_bundle(tiny.trained()[0]), Path.rename
    folder = save_bundle(bundle, tmp_path / "b")

    def interrupted(self: Path, target: Path) -> None:
        rename(self, target)
        if self == folder:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(dataclasses.replace(bundle, thresholds=(0.75, 0.0)), folder)
    assert load_bundle(folder).thresholds == bundle.thresholds
    assert os.listdir(tmp_path) == ["b"]


def test_a_bundle_is_not_read_half_old_half_new(tmp_path: Path, monkeypatch) -> None:
    bundle, read = load_bundle(tiny.trained()[0]), bundle_module.load_tokenizer
    folder = save_bundle(bundle, tmp_path / "b")

    def overtaken(path: Path) -> Tokenizer:
        save_bundle(dataclasses.replace(bundle, thresholds=(0.75, 0.0)), path)
        return read(path)

    monkeypatch.setattr(bundle_module, "load_tokenizer", overtaken)
    with pytest.raises(ValueError, match=r"b is being written at this moment: try again"):
        load_bundle(folder)


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
        ("exits.json", {"provenance": None}, "exits.json is damaged"),
        ("exits.json", {"buckets": ["a"]}, "invalid literal for int"),
        ("exits.json", {"abstain": 1.5}, "an abstain threshold from 0 to 1, or none. Got 1.5"),
        ("exits.json", {"max_length": 4096}, "max_length must be at most the 32 positions"),
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


@pytest.mark.parametrize("field", ["temperatures", "layers"])
def test_exits_that_do_not_fit_the_weights_are_named(tmp_path: Path, field: str) -> None:
    folder = tiny.copy_of_bundle(tmp_path)
    meta = json.loads((folder / "exits.json").read_text())
    meta[field] = {"temperatures": [1.0], "layers": [1, 2, 3]}[field]
    (folder / "exits.json").write_text(json.dumps(meta))
    with pytest.raises(
        ValueError, match=r"must hold 2 positive temperatures|does not fit exits.json"
    ):
        load_bundle(folder)


def test_thresholds_near_one_are_told_apart():
    assert describe_thresholds((0.5, 0.9996, 0.99999, 2.0, 0.0)) == "0.500, 0.9996, 0.99999, none"
    assert describe_thresholds((0.9999996, 0.9999996, 0.0)) == "0.9999996"
