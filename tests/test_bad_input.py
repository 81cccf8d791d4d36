"""Wrong input: exit code 2, one sentence that helps, and nothing half-written."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ejax.bundle import load_bundle
from ejax.evaluation.labelled import labelled_rows
from ejax.predict import columns_of
from ejax.training.checkpoint import alone_in
from train.__main__ import app as train_program

pytestmark = pytest.mark.filterwarnings("ignore:exit .*:UserWarning")
GOOD = "label\ttext\nbad\tawful film\ngood\tgreat film\n"


def train_refused(tmp_path: Path, *args: object, train: str = "", **files: object) -> str:
    """The sentence with which `ejax train` refuses; it has made no bundle and no workdir."""
    output = tmp_path / "bundle"
    given = {"train": train or tiny.file("train"), "dev": tiny.file("dev")} | files
    options = [item for name, path in given.items() for item in (f"--{name}", path)]
    before = sorted(tmp_path.iterdir())
    sentence = tiny.refused(
        "train", "--model", tiny.model(), *options, "--output", output, *tiny.FIELDS, *args
    )
    assert sorted(tmp_path.iterdir()) == before
    return sentence


def test_no_such_file_names_the_nearest(tmp_path):
    sentence = train_refused(tmp_path, train=str(tiny.data() / "trian.tsv"))
    assert sentence == (
        f"No such file: {tiny.data()}/trian.tsv. Did you mean {tiny.data()}/train.tsv?"
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.tsv", "", "empty.tsv is empty."),
        ("header.tsv", "label\ttext\n", "header.tsv"),
        ("one.tsv", "label\ttext\ngood\ta\ngood\tb\n", "has only the label 'good'"),
        ("no_label.tsv", "stars\ttext\nbad\ta\ngood\tb\n", "which column holds the label?"),
        ("cells.tsv", GOOD + "bad\ta\tb\n", "line 4: expected 2 columns (label, text). Got 3."),
        ("utf8.tsv", (GOOD + "bad\tcaf\xe9\n").encode("latin-1"), "line 4: not UTF-8"),
        (
            "cut.tsv.gz",
            gzip.compress(f"{GOOD}bad\tpoor film\n".encode(), mtime=0)[:-9],
            "cut.tsv.gz cannot be read",
        ),
        ("multi.jsonl", '{"text": "a", "label": ["x", "y"]}\n', "multi_label_classification"),
        ("number.jsonl", '{"text": "a", "label": 0.5}\n', "set problem_type=regression"),
        ("number.tsv", "label\ttext\n3.75\ta\n", "set problem_type=regression"),
        ("broken.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', "line 2: not JSON"),
        ("quote.csv", 'label,text\nbad,"a\n', "line 2: not csv"),
        ("train.parquet", "PAR1", "train.parquet cannot be read as parquet: "),
    ],
)
def test_a_training_file_that_does_not_fit(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = train_refused(tmp_path, train=str(path))
    assert expected in sentence
    assert name in sentence


def test_an_unknown_label_in_dev_names_the_line(tmp_path):
    dev = tmp_path / "dev.tsv"
    dev.write_text(GOOD + "neutral\tthe film\n")
    sentence = train_refused(tmp_path, dev=dev)
    assert f"{dev}, line 4: label 'neutral' is not among the labels of train: bad, good" in sentence


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--layers", "3,1"], "exit layers must be ascending"),
        (["--layers", "1,1,2"], "exit layers must be ascending"),
        (["--layers", "0"], "0 or above, the last one at least 1, such as 0,1,2,4,6. Got (0,)."),
        (["--layers", "-1,2"], "exit layers must be ascending, 0 or above"),
        (["--layers", "1,9"], "at most 3, the layers of this encoder"),
        (["--layers", "1,x"], "layers must be"),
        (["--pooling", "max"], "pooling must be one of 'auto', 'cls', 'mean', 'pair'. Got 'max'."),
        (["--pooling", "pair"], "pooling pair is for rows of two texts. Got rows of one"),
        (["--epochs", "two"], "epochs must be int. Got 'two'."),
        (["--seed", "-1"], "seed must be 0 or above"),
        (["--max-length", "3"], "data.max_length must be at least 4 tokens. Got 3."),
        (["epoch=3"], "no field 'epoch'. Did you mean 'epochs'?"),
        (["data.max_lenght=3"], "Did you mean 'max_length'?"),
        (["learning_rate=fast"], "learning_rate must be a finite float. Got 'fast'."),
        (["epochs"], "an override must look like field=value. Got 'epochs'."),
        (["--text-column", "review"], "has no column 'review'. Its columns: label, text."),
        (["--label-column", "class"], "no column 'class' for the label"),
        (["exit_weights=1,2"], "exit_weights must hold 3 weights. Got 2"),
        (["--learning-rat", "1"], "No such option"),
    ],
)
def test_a_setting_that_does_not_fit(tmp_path, args, expected):
    assert expected in train_refused(tmp_path, *args)


def test_no_such_model(tmp_path):
    sentence = tiny.refused(
        "train", "--model", tmp_path / "bert", "--train", tiny.file("train"), "--output", "b"
    )
    assert "bert' is neither a folder here, nor a hub id" in sentence


def test_no_data(tmp_path):
    sentence = tiny.refused("train", "--model", tiny.model(), "--output", tmp_path / "bundle")
    assert sentence.startswith("no data: set ")


def test_a_workdir_where_another_training_runs(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with alone_in(workdir):
        sentence = tiny.refused(*tiny.train_args(tmp_path / "bundle"), "--workdir", workdir)
    assert sentence.startswith(f"another training runs in {workdir}: wait until it ends")
    assert not list(workdir.glob("checkpoints/*"))


def test_the_workdir_of_another_config(tmp_path):
    folder, _ = tiny.trained()
    before = {path: path.stat().st_mtime_ns for path in Path(f"{folder}.work").rglob("*")}
    output = tmp_path / "bundle"
    sentence = tiny.refused(
        *tiny.train_args(output), "--workdir", f"{folder}.work", "seed=1", "dropout=0.2"
    )
    assert "belongs to another training config (it differs in dropout, seed)" in sentence
    assert not output.exists()
    assert before == {path: path.stat().st_mtime_ns for path in Path(f"{folder}.work").rglob("*")}


def test_an_output_that_is_no_bundle_is_refused_before_training(tmp_path):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.tex").write_text("years of work")
    sentence = tiny.refused(*tiny.train_args(output))
    assert sentence == f"{output} exists and is not a bundle: choose another output folder."
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.tex"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))


def _without_temperature(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperatures": [1.0]}))


def _half(path: Path) -> None:
    path.write_text(path.read_text()[: path.stat().st_size // 2])


def _odd_threshold(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholds": ["high", 0]}))


def _few_thresholds(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholds": [0.9]}))


def _other_layers(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": [3, 1]}))


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("model.safetensors", Path.unlink, "is not a whole bundle: model.safetensors missing"),
        ("config.json", Path.unlink, "is not a whole bundle: config.json missing"),
        ("tokenizer.json", Path.unlink, "is not a whole bundle: tokenizer.json missing"),
        ("exits.json", Path.unlink, "is not a whole bundle: exits.json missing"),
        ("model.safetensors", _cut, "model.safetensors is damaged"),
        ("config.json", _half, "config.json is damaged"),
        ("tokenizer.json", _half, "tokenizer.json"),
        ("exits.json", _half, "exits.json is damaged"),
        ("exits.json", _newer, "format_version of at most 4. Got 99: update ejax"),
        ("exits.json", _without_temperature, "temperatures must be 2 positive numbers"),
        ("exits.json", _odd_threshold, "thresholds[0] must be a number. Got 'high'"),
        (
            "exits.json",
            _few_thresholds,
            "2 thresholds from 0 to 1000, one per exit. Got [0.9]",
        ),
        ("exits.json", _other_layers, "exit layers must be ascending"),
    ],
)
def test_a_damaged_bundle(tmp_path, name, damage, expected):
    folder = tiny.copy_of_bundle(tmp_path)
    damage(folder / name)
    left = {path: path.read_bytes() for path in folder.iterdir()}
    old = tmp_path / "out.tsv"
    old.write_text("of yesterday")
    sentence = tiny.refused("predict", folder, "--input", tiny.file("test"), "--output", old)
    assert expected in sentence
    assert str(folder) in sentence
    assert old.read_text() == "of yesterday"
    assert expected in tiny.refused("calibrate", folder, "--data", tiny.data())
    assert left == {path: path.read_bytes() for path in folder.iterdir()}


def test_no_bundle_at_all(tmp_path):
    assert "nothing does not exist. A bundle is" in tiny.refused("predict", tmp_path / "nothing")
    tiny.copy_of_bundle(tmp_path)
    assert f"Did you mean {tmp_path / 'bundle'}?" in tiny.refused("predict", tmp_path)
    assert "neither a folder here, nor a hub id" in tiny.refused("info", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--threshold", "high"], "a threshold must be a number of at least 0, or full"),
        (["--threshold", "nan"], "a threshold must be a number of at least 0, or full"),
        (["--threshold", "-1"], "a threshold must be a number of at least 0, or full"),
        (["--top-k", "0"], "--top-k must be a positive number or all. Got '0'."),
        (["--on-error", "ignore"], "--on-error must be stop or skip. Got 'ignore'."),
        (["--output", "out.xlsx"], "out.xlsx: cannot write that format"),
        (["--output", "no/such/folder.tsv"], "no/such/folder.tsv cannot be written: No such file"),
        (["--output", "/tmp"], "/tmp is a folder"),
        (["--input", "nothing.tsv"], "No such file: nothing.tsv"),
        (["--text-column", "review"], "has no column 'review'. Its columns: label, text."),
        (["--treshold", "0.9"], "No such option: --treshold"),
    ],
)
def test_predict_with_wrong_settings(args, expected):
    source = () if "--input" in args else ("--input", tiny.file("test"))
    assert expected in tiny.refused("predict", tiny.trained()[0], *source, *args)


def test_pairs_are_not_taken_for_texts(tmp_path):
    source = tmp_path / "pairs.tsv"
    source.write_text("sentence1\tsentence2\tlabel\ngreat\tfilm\tgood\npoor\tfilm\tbad\n")
    expected = "has 2 text columns (sentence1, sentence2), and this bundle was trained on 1 (text)"
    assert expected in tiny.refused("predict", tiny.trained()[0], "--input", source)
    assert expected in tiny.refused("evaluate", tiny.trained()[0], "--data", source)
    args = ("predict", tiny.trained()[0], "--input", source, "--text-column", "sentence1")
    assert tiny.ejax(*args).code == 0


def test_every_command_reads_the_columns_of_the_training(tmp_path):
    bundle = load_bundle(tiny.trained()[0])
    assert bundle.provenance["text_columns"] == ["text"]
    config = bundle.provenance["config"]
    stars = {**config, "data": {**config["data"], "label_column": "stars"}}
    assert bundle.provenance["label_column"] == "label"
    made = {**bundle.provenance, "config": stars, "text_columns": ["review"]}
    del made["label_column"]  # as of a bundle that says only what its training was asked for
    bundle = dataclasses.replace(bundle, provenance=made)
    source = tmp_path / "in.tsv"
    source.write_text("text\treview\tstars\nno\tgreat film\tgood\n")
    assert [row.text for row in labelled_rows(bundle, str(source))] == ["great film"]
    assert columns_of(bundle, (), ("text", "review", "stars"), "in.tsv") == ("review",)
    assert columns_of(bundle, (), ("stars", "opinion"), "in.tsv") == ("opinion",)
    assert columns_of(bundle, (), ("label", "opinion"), "in.tsv") == ("opinion",)
    source.write_text("label\tstars\tReview\npoor\tgood\tgreat film\n")  # stars is remembered
    assert [(row.text, row.label) for row in labelled_rows(bundle, str(source))] == [
        ("great film", 1)
    ]
    source.write_text("Category\treview\ngood\tgreat film\n")  # else a usual name
    assert [row.label for row in labelled_rows(bundle, str(source))] == [1]
    source.write_text("class\tintent\treview\ngood\tbad\tgreat film\n")
    with pytest.raises(ValueError, match=r"which column holds the label, class or intent\?"):
        labelled_rows(bundle, str(source))
    assert labelled_rows(bundle, str(source), label_column="Class")[0].label == 1
    made = {**made, "label_column": "intent"}  # as recognised when it was trained
    bundle = dataclasses.replace(bundle, provenance=made)
    assert labelled_rows(bundle, str(source))[0].label == 0


def test_predict_stops_at_a_bad_row_and_keeps_the_old_output(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "great"}\n{"text": 3}\n{"text": "poor"}\n')
    output.write_text("of yesterday")
    sentence = tiny.refused("predict", tiny.trained()[0], "--input", source, "--output", output)
    assert sentence == f"{source}, line 2: column 'text' must hold text. Got 3."
    assert output.read_text() == "of yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("in.jsonl", b'{"text": "great"}\n{"text": 3}\n[1]\n{"text\n{"text": "poor"}\n', (2, 3, 4)),
        ("in.tsv", b"text\tn\ngreat\t1\na\tb\tc\ncaf\xe9\t2\npoor\t3\n", (3, 4)),
        ("in.csv", b'text,n\ngreat,1\na,b,c\n"x"y,2\npoor,3\n', (3, 4)),
        ("in.csv", b'text,n\ngreat,1\n"a, 2\nb"c",3\npoor,3\n', ("s 3 to 4",)),
        ("in.txt", b"great\ncaf\xe9\npoor\n", (2,)),
    ],
)
def test_predict_skips_bad_rows_and_names_them(tmp_path, name, content, lines):
    source, output = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(content)
    args = ("--input", source, "--output", output, "--on-error", "skip")
    result = tiny.ejax("predict", tiny.trained()[0], *args)
    assert result.code == 0, result.err
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert texts == ["great", "poor"]
    *named, last = result.err.splitlines()
    assert len(named) == len(lines)
    for sentence, line in zip(named, lines, strict=True):
        where = f" {line}" if isinstance(line, int) else line
        assert sentence.startswith(f"skipped: {source}, line{where}: ")
    assert last.startswith(f"2 rows labelled, {len(lines)} skipped, ")


def test_a_jsonl_whose_text_changes_its_column(tmp_path):
    """A row of its own columns must not decide in silence for those of the others."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    args = ("predict", tiny.trained()[0], "--input", source, "--output", output)
    source.write_text('{"title": "great"}\n{"title": "film", "text": "awful"}\n')
    said = f"{source}, line 2: the text is in text, and was read from title before"
    for more in ((), ("--on-error", "skip")):
        assert said in tiny.refused(*args, *more)
    assert not output.exists()
    assert tiny.ejax(*args, "--text-column", "title").code == 0
    source.write_text(
        '{"title": "great", "label": "good"}\n{"text": "awful", "title": "a", "label": "bad"}\n'
    )
    assert "the text is in text" in tiny.refused("evaluate", tiny.trained()[0], "--data", source)
    source.write_text('{"id": 1, "n": 2}\n{"text": "great"}\n')
    assert "line 1: column 'n' must hold text. Got 2." in tiny.refused(*args)
    assert tiny.ejax(*args, "--on-error", "skip").code == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["great"]
    source.write_text('{"a": "great", "b": "film"}\n')
    assert "which column holds the text" in tiny.refused(*args, "--on-error", "skip")


def test_an_empty_shard_has_an_empty_answer(tmp_path):
    """That reads back: a tsv has its header."""
    for name, content, wanted in (
        ("in.tsv", "id\ttext\n", "id\ttext\tlabel\tscore\texit_layer\n"),
        ("in.csv", "label,text\n", "label,text,predicted_label,score,exit_layer\n"),
        ("in.jsonl", "", ""),
        ("in.txt", "", ""),
        ("in.jsonl", "", "label,score,exit_layer\n"),
        ("in.txt", "", "text,label,score,exit_layer\n"),
    ):
        source = tmp_path / name
        output = tmp_path / f"out{'.csv' if ',' in wanted else source.suffix}"
        output = output.with_suffix(".jsonl") if name == "in.txt" and not wanted else output
        source.write_text(content)
        done = tiny.ejax("predict", tiny.trained()[0], "--input", source, "--output", output)
        assert (done.code, output.read_text()) == (0, wanted), done.err
    said = tiny.refused("predict", tiny.trained()[0], "--input", "a" * 300, "--output", output)
    assert said.startswith("aaa")
    assert ": File name too long" in said


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data", "nothing"], "No such file or folder: nothing"),
        (["--data", "glue/sst3"], "nor is it one of the data sets glue/sst2"),
        (["--split", "validation"], "split must be one of train, dev, test"),
        (["--thresholds", "0.7,high"], "a threshold must be a number"),
        (["--output", "result"], "--output must end in .json"),
        (["--output", "no/such/result.json"], "--output must be a file in a folder that exists"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_evaluate_with_wrong_settings(args, expected):
    data = () if "--data" in args else ("--data", tiny.data())
    assert expected in tiny.refused("evaluate", tiny.trained()[0], *data, *args)


def test_labels_that_the_bundle_does_not_know(tmp_path):
    source = tmp_path / "test.tsv"
    source.write_text(GOOD + "neutral\tthe film\n")
    for verb in ("evaluate", "calibrate"):
        sentence = tiny.refused(verb, tiny.trained()[0], "--data", source)
        assert f"{source}, line 4: label 'neutral'" in sentence


def test_calibrate_refuses_rows_that_would_mislead(tmp_path):
    folder = tiny.copy_of_bundle(tmp_path)
    before = (folder / "exits.json").read_bytes()
    assert "confidences on trained rows" in tiny.refused(
        "calibrate", folder, "--data", tiny.data(), "--split", "train"
    )
    source = tmp_path / "one.tsv"
    source.write_text("label\ttext\nbad\tawful film\n")
    assert "calibration needs at least 2 rows" in tiny.refused(
        "calibrate", folder, "--data", source
    )
    assert "max_drop must be 0 points or above" in tiny.refused(
        "calibrate", folder, "--data", tiny.data(), "--max-drop", "-1"
    )
    assert (folder / "exits.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "a target must be one of max_drop, budget, budget_ms and risk. Got none"),
        (["--budget", "0.5", "--risk", "0.1"], "Got budget and risk"),
        (["--budget", "0"], "a budget must be a number above 0"),
        (["--budget", "0.1"], "a budget must be at least 0.3334"),
        (["--budget", "40"], "a share of full depth, above 0 and at most 1. Got 40"),
        (["--budget", "0.5", "--delta", "0.1"], "delta goes with risk or max_drop. Got budget"),
        (["--max-drop", "1", "--loss", "error"], "loss goes with risk alone. Got max_drop"),
        (["--max-drop", "0", "--delta", "0.1"], "max_drop must be above 0 and below 100. Got 0"),
        (["--max-drop", "nan"], "max_drop must be 0 points or above"),
        (["--risk", "1"], "risk must be between 0 and 1"),
        (["--risk", "1e-310"], "and at least 1e-9. Got 1e-310"),
        (["--risk", "0.1", "--delta", "0"], "delta must be between 0 and 1"),
        (["--risk", "0.1", "--loss", "both"], "loss must be one of disagreement, error, wrong"),
        (["--budget", "0.5", "--split", "train"], "confidences on trained rows"),
        (["--budget", "half"], "--budget"),
    ],
)
def test_thresholds_for_a_wrong_target(args, expected, tmp_path):
    folder = tiny.copy_of_bundle(tmp_path)
    before = (folder / "exits.json").read_bytes()
    assert expected in tiny.refused("thresholds", folder, "--data", tiny.data(), *args)
    assert (folder / "exits.json").read_bytes() == before


def test_the_least_budget_that_a_refusal_names_is_enough(tmp_path):
    folder = tiny.copy_of_bundle(tmp_path)
    done = tiny.ejax("thresholds", folder, "--data", tiny.data(), "--budget", 0.3334)
    assert done.code == 0, done.err
    assert load_bundle(folder).provenance["target"]["chosen"]["exit_share"] == [1, 0]


def test_thresholds_never_choose_on_rows_that_fitted_temperatures(tmp_path):
    folder = tiny.copy_of_bundle(tmp_path)
    assert tiny.ejax("calibrate", folder, "--data", tiny.file("test")).code == 0
    assert "test.tsv fitted this bundle: thresholds need other rows" in tiny.refused(
        "thresholds", folder, "--data", tiny.file("test"), "--budget", "0.5"
    )


def test_the_disk_is_full_for_predictions():
    sentence = tiny.refused(
        "predict", tiny.trained()[0], "--input", tiny.file("test"), "--output", "/dev/full"
    )
    assert (
        sentence == "/dev/full cannot be written: No space left on device. Nothing of it was kept."
    )


def test_the_disk_is_full_for_a_bundle(tmp_path):
    """No file may grow above 20 kB: the weights do not fit, and the old bundle stays."""
    folder = tiny.copy_of_bundle(tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    done = tiny.process("calibrate", folder, "--data", tiny.file("dev"), before=limit)
    assert done.code == 2, done
    assert f"ejax: {folder} cannot be written: " in done.err
    assert "Traceback" not in done.err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]


def test_the_disk_is_full_for_the_copy_of_the_data(tmp_path, monkeypatch):
    """Written by a library in C++ that has only words for it."""
    limit = f"import os, resource; os.environ['EJAX_CACHE'] = {str(tmp_path / 'cache')!r}\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    output = tmp_path / "bundle"
    done = tiny.process(*tiny.train_args(output), before=limit)
    assert done.code == 2, done
    assert done.err.startswith("ejax: File too large (")
    assert done.err.endswith("Make room and repeat the command.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    monkeypatch.setenv("EJAX_CACHE", str(tmp_path / "cache"))
    # Nothing broken was cached: the data are read, and only then the exits refused.
    assert "at most 3" in tiny.refused(*tiny.train_args(output), "layers=9")


def test_an_empty_text_is_classified_and_a_megabyte_truncated(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("\n" + "the film was great " * 60000 + "\npoor\n")
    result = tiny.ejax("predict", tiny.trained()[0], "--input", source)
    assert result.code == 0, result.err
    empty, long, short = map(json.loads, result.out.splitlines())
    assert empty["label"] in ("bad", "good")
    assert (long["label"], short["label"]) == ("good", "bad")
    assert len(long["text"]) > 1_000_000  # the row itself is whole


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file: {path} (--config)."),
        ("x = 1\n", "{path} must define `config = TrainConfig(…)`. Got NoneType."),
        ("config = {}\n", "{path} must define `config = TrainConfig(…)`. Got dict."),
        ("1 / 0\n", "{path} cannot be run: ZeroDivisionError: division by zero."),
        ("config = (\n", "{path} cannot be run: SyntaxError: '(' was never closed"),
        (
            "from ejax import TrainConfig\nconfig = TrainConfig(epochs=-1)\n",
            "{path}: epochs must be 0 or above. Got -1.",
        ),
    ],
)
def test_a_config_file_that_does_not_fit(tmp_path, capsys, content, expected):
    from ejax.cli.run import run

    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    code = run(train_program, "train", ["--config", str(path), "--workdir", str(tmp_path / "w")])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("train: " + expected.format(path=path))
    assert err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_bug_keeps_its_traceback():
    """An error inside numpy that ejax did not foresee is not passed off as bad input."""
    code = (
        "import numpy as np, ejax.classifier as c\n"
        "c.EarlyExitClassifier.from_pretrained = lambda folder: np.zeros(3).reshape(2)\n"
        "from ejax.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "bundle"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "cannot reshape array" in done.stderr
