"""Learning from a teacher, and from texts without labels."""

import dataclasses
import gzip
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_processes as runs
import test_training as steps
import tiny
from rich.console import Console

from ejax.bundle import load_bundle
from ejax.classifier import EarlyExitClassifier
from ejax.cli.run import run
from ejax.config import DataConfig, ExitConfig, TrainConfig
from ejax.data.rows import TokenizedSplit
from ejax.data.sources import Example, load, row_hash
from ejax.data.tokenizer import load_tokenizer
from ejax.data.unlabelled import read_unlabelled
from ejax.models.ngrams import ragged_logits
from ejax.provenance import TRAINED
from ejax.saving import save_bundle
from ejax.training.finetune import finetune
from ejax.training.losses import joint_loss
from ejax.training.ngrams import fit_ngrams
from ejax.training.optim import MIX_RATE
from ejax.training.processes import Stopped, Terminated
from ejax.training.setup import with_unlabelled
from ejax.training.step import Rows
from ejax.training.teacher import probabilities
from ejax.training.warm import warm_heads
from train.__main__ import load_config
from train.teacher import app, write_files

LOGITS = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.2, 0.8]]]))
LABELS, REAL = jnp.array([0, -1]), jnp.ones(2)


def kl(p: list[float], q: list[float]) -> float:
    return float(np.dot(p, np.log(np.divide(p, q))))


def test_a_row_without_a_label_learns_from_the_last_exit_alone() -> None:
    loss, count = joint_loss(LOGITS, LABELS, REAL, distillation=2.0)
    assert count == 2
    by_label = -np.log(0.5) - np.log(0.25)
    taught = kl([0.25, 0.75], [0.5, 0.5]) + kl([0.2, 0.8], [0.9, 0.1])
    np.testing.assert_allclose(loss, by_label + 2 * taught, rtol=1e-6)
    grad = jax.grad(lambda x: joint_loss(x, LABELS, REAL, distillation=2.0)[0])(LOGITS)
    np.testing.assert_allclose(grad[0, 1], [2 * (0.9 - 0.2), 2 * (0.1 - 0.8)], rtol=1e-5)
    np.testing.assert_allclose(grad[1, 1], 0, atol=1e-6)
    assert np.abs(grad[1, 0]).min() > 0.1


def test_a_teacher_teaches_the_last_exit_too() -> None:
    teacher = jnp.array([[0.6, 0.4], [1.0, 0.0]])
    loss, _ = joint_loss(LOGITS, LABELS, REAL, distillation=2.0, teacher=teacher)
    by_label = -np.log(0.5) - np.log(0.25)
    first = kl([0.6, 0.4], [0.5, 0.5]) + kl([0.6, 0.4], [0.25, 0.75])
    second = -np.log(0.9) - np.log(0.2)
    np.testing.assert_allclose(loss, by_label + 2 * (first + second), rtol=1e-6)


def test_class_weights_of_a_row_without_a_label_are_the_mean_by_its_teacher() -> None:
    weights = (1.0, 3.0)
    _, own = joint_loss(LOGITS, LABELS, REAL, class_weights=weights, distillation=1.0)
    np.testing.assert_allclose(own, 1 + (0.2 * 1 + 0.8 * 3), rtol=1e-6)
    teacher = jnp.array([[0.6, 0.4], [0.5, 0.5]])
    loss, count = joint_loss(
        LOGITS, LABELS, REAL, class_weights=weights, distillation=1.0, teacher=teacher
    )
    np.testing.assert_allclose(count, 1 + 2, rtol=1e-6)
    second = kl([0.5, 0.5], [0.9, 0.1]) + kl([0.5, 0.5], [0.2, 0.8])
    alone, _ = joint_loss(LOGITS, LABELS, REAL.at[1].set(0), distillation=1.0, teacher=teacher)
    np.testing.assert_allclose(loss - alone, 2 * second, rtol=1e-5)


def mixed(seed: int = 0, *, taught: bool = True) -> Rows:
    """11 rows, 3 of them padding; 5 of the others without a label, 3 on one device of four."""
    rows = steps.labelled(seed=seed)
    labels = np.where([0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0], -1, rows.labels).astype(np.int32)
    said = np.random.default_rng(seed).dirichlet(np.ones(4), len(labels)).astype(np.float32)
    labels[0] = -1
    return rows._replace(labels=labels, teacher=said if taught else None)


def take_steps(devices: int, config: TrainConfig, *, taught: bool, count: int = 3):
    state = steps.replicate(steps.fresh_state(config)[0], jax.devices()[:devices])
    optimizer = steps.fresh_state(config)[1]
    step = steps.parallel_step(
        steps.make_train_step(steps.MODEL, optimizer, config),
        jax.devices()[:devices],
        accumulate=config.accumulate,
    )
    metrics = {}
    for i in range(count):
        state, metrics = step(state, mixed(i, taught=taught))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize("taught", [True, False])
def test_devices_and_micro_batches_change_nothing_but_rounding(taught: bool) -> None:
    config = dataclasses.replace(steps.CONFIG, class_weights=(1.0, 0.5, 2.0, 1.5))
    ways = [(1, config), (4, dataclasses.replace(config, accumulate=2))]
    (one, metrics_one), (four, metrics_four) = (take_steps(*way, taught=taught) for way in ways)
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(state.params) for state in (one, four)), strict=True
    ):  # see test_training's four devices
        np.testing.assert_allclose(a, b, atol=2e-5 * (MIX_RATE if path[-1].key == "mix" else 1))
    for name in metrics_one:
        np.testing.assert_allclose(metrics_one[name], metrics_four[name], rtol=1e-4)


def test_accuracy_and_loss_per_exit_are_of_the_rows_with_a_label() -> None:
    rows = mixed()
    labelled = rows._replace(weights=rows.weights * (rows.labels >= 0))
    (_, every), (_, some) = steps.one_step(rows), steps.one_step(labelled)
    for name in ("exit_loss", "exit_accuracy"):
        np.testing.assert_allclose(every[name], some[name], rtol=1e-6)
    assert abs(every["loss"] - some["loss"]) > 1e-3


GRAMS = ExitConfig(layers=(0, 1), num_labels=2, buckets=1 << 10)


def task_of(
    texts: list[str], labels: list[int], teacher: np.ndarray | None = None
) -> TokenizedSplit:
    encoded = load_tokenizer(tiny.model()).encode(texts, 16, whole=64)
    return TokenizedSplit(encoded, np.array(labels, np.int32), texts, teacher)


def says(task: TokenizedSplit, text: str, **settings) -> np.ndarray:
    """The probabilities of exit 0 for a text, once trained."""
    rows = task.teaching()
    table = fit_ngrams(rows.encoded.whole, rows.targets(2, 1.0), GRAMS, **settings)
    asked = task_of([text], [0]).encoded.whole
    return jax.nn.softmax(ragged_logits(table, asked.ids, asked.types, asked.offsets))[0]


def test_exit_0_learns_what_only_the_teacher_knows() -> None:
    """The word "poor" stands in no row with a label."""
    texts = ["awful film", "great film"] * 5 + ["poor film", "fine film"] * 4
    labels = [0, 1] * 5 + [-1] * 8
    said = np.array([[0.98, 0.02], [0.02, 0.98]] * 9, np.float32)
    alone, taught = (says(task_of(texts, labels, t), "poor film")[0] for t in (None, said))
    assert abs(alone - 0.5) < 0.1
    assert taught > 0.8
    # Its doubts are learned too.
    said[-8:] = [[0.7, 0.3], [0.3, 0.7]] * 4
    assert 0.55 < says(task_of(texts, labels, said), "poor film")[0] < 0.75
    # A label counts as before, once; a class of weight 0 not at all.
    known = task_of(texts[:10], labels[:10])
    np.testing.assert_allclose(
        says(task_of(texts, labels), "awful film"), says(known, "awful film")
    )
    weighed = says(task_of(texts, labels, said), "fine film", class_weights=(1.0, 0.0))
    assert weighed[0] > 0.9


def test_heads_start_on_what_the_teacher_says() -> None:
    params = steps.fresh_state()[0].params
    said = np.eye(4, dtype=np.float32)[np.arange(13) % 4]
    vectors = np.tile(2 * said, (3, 1, 3))  # [L, N, D]
    labels = np.full(13, -1)
    labels[:2] = 0
    heads = warm_heads(steps.MODEL, params["heads"], vectors, labels, steps.CONFIG, said)
    logits = steps.MODEL.apply({"params": {"heads": heads}}, vectors, method="from_vectors")
    assert (logits.argmax(axis=-1)[:, 2:] == said.argmax(axis=-1)[2:]).all()


# From here on whole runs and files.

FEW = [(label, text) for label, text in tiny.rows(60, 50) if re.search("awful|great", text)][:13]
TEXTS = [text for _, text in tiny.rows(151, 60)]


def few(folder: Path) -> Path:
    return tiny.write_tsv(folder / "few.tsv", FEW)


def lines(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def train_few(folder: Path, *more: object) -> tiny.Result:
    args = tiny.train_args(folder / "bundle")
    args[args.index("--train") + 1] = few(folder)
    return tiny.ejax(*args, "distillation=1", "epochs=9", *more)


def test_a_teacher_and_texts_without_labels_raise_accuracy(tmp_path: Path) -> None:
    """Labels of rows with two of the four words; the texts hold all of them."""
    alone, taught = tmp_path / "alone", tmp_path / "taught"
    for folder in (alone, taught):
        folder.mkdir()
    assert train_few(alone).code == 0
    texts = lines(taught / "more.txt", [*TEXTS, tiny.rows(30, 2, wrong=7)[4][1]])  # one of test
    teacher = tiny.trained()[0]
    done = train_few(taught, "--teacher", teacher, "--unlabelled", texts, "epochs=4")
    assert done.code == 0, done.err
    err = " ".join(done.err.split())
    # The console wraps at its width, also within a path.
    assert f"152unlabelledrows:{texts}" in "".join(done.err.split())
    assert re.search(r"\d rows of test are left out: they are in train or unlabelled", err)
    bundles = [load_bundle(folder / "bundle") for folder in (alone, taught)]
    for bundle in bundles:
        clf = EarlyExitClassifier(bundle)
        asked = tiny.rows(33, 61)
        truth = [bundle.labels.index(label) for label, _ in asked]
        answers = clf.exit_logits(clf.encode([text for _, text in asked])).argmax(axis=-1)
        right = (answers == truth).mean(axis=1)
        wanted = (0.4, 0.85) if bundle is bundles[0] else (0.95, 1.01)
        assert (right > wanted[0]).all(), right
        assert (right < wanted[1]).all(), right
    # What taught is spent, the texts and what trained or picked the teacher alike.
    known = load_bundle(teacher)
    spent = {row_hash(Example(text, None, -1)) for text in TEXTS}
    assert bundles[1].ledger.among(spent, TRAINED) == spent
    of_teacher, own = bundles[1].ledger.trainings
    assert of_teacher.salt == known.ledger.trainings[0].salt != own.salt
    assert of_teacher.rows["train"] == tiny.rows_of(known)["train"]
    assert of_teacher.rows["picked"] == tiny.rows_of(known)["dev_a"]
    assert f"taught by     {teacher.parent.name}/bundle" in tiny.ejax("info", taught / "bundle").out
    chosen = tiny.write_tsv(tmp_path / "chosen.tsv", tiny.rows(151, 60))
    refusal = tiny.refused("thresholds", taught / "bundle", "--budget", 0.9, "--data", chosen)
    assert "every row of" in refusal


def test_texts_without_labels_are_taught_by_the_last_exit(tmp_path: Path) -> None:
    """Also exit 0, which learns from labels alone; batches without a label have no accuracy."""
    texts = lines(tmp_path / "more.txt")
    done = train_few(
        tmp_path, "--unlabelled", texts, "--layers", "0,1,3", "epochs=2", "batch_size=3"
    )
    assert done.code == 0, done.err
    work = tmp_path / "bundle.work"
    log = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    steps_taken = max(line["step"] for line in log)
    assert steps_taken <= 2 * -(-(13 + 151) // 3)
    assert "NaN" not in (work / "metrics.jsonl").read_text()
    assert not (work / "teacher.safetensors").exists()
    trained = tiny.rows_of(load_bundle(tmp_path / "bundle"))["train"]
    assert len(trained) == len({*TEXTS, *(text for _, text in FEW)})


def test_a_run_that_resumes_asks_no_teacher_again(tmp_path: Path, monkeypatch) -> None:
    """Stopped and repeated, or by two processes: the same run."""
    data = DataConfig(
        path=str(tiny.data()), max_length=16, buckets=(16,),
        unlabelled=str(lines(tmp_path / "more.txt", TEXTS[:41])),
    )  # fmt: skip
    path = runs.write_config(
        tmp_path, data=data, teacher=str(tiny.trained()[0]), layers=(0, 1, 3), epochs=4
    )
    whole, stopped, two = (tmp_path / name for name in ("whole", "stopped", "two"))
    processes, config = runs.start_two(path, two), load_config(path)
    finetune(config, whole, console=Console(quiet=True))
    monkeypatch.setattr(Terminated, "at", lambda self, step: step == 4)
    with pytest.raises(Stopped):
        finetune(config, stopped, console=Console(quiet=True))
    monkeypatch.undo()
    told, said = stopped / "teacher.safetensors", io.StringIO()
    before = told.stat().st_mtime_ns
    finetune(config, stopped, console=Console(file=said))
    assert "resuming" in said.getvalue()
    assert told.stat().st_mtime_ns == before
    runs.assert_same_run(stopped, whole)
    for process in processes:
        runs.finish(process)
    for key, value in runs.weights(whole).items():
        if not key.endswith("key.bias"):  # softmax cancels it: Adam makes steps of its rounding
            limit = 2e-2 if "mix" in key else 5e-4
            np.testing.assert_allclose(runs.weights(two)[key], value, atol=limit, err_msg=key)
    one, other = (
        EarlyExitClassifier(load_bundle(run / "bundle", dtype="float32")) for run in (whole, two)
    )
    texts = one.encode(TEXTS)
    worst = np.abs(other.exit_logits(texts) - one.exit_logits(texts)).max(axis=(1, 2))
    assert (worst < 1e-3).all(), worst


def test_the_teachers_answers_are_its_full_depth_calibrated() -> None:
    bundle = load_bundle(tiny.trained()[0], dtype="float32")
    bundle = dataclasses.replace(bundle, temperatures=(0.5, 3.0))
    texts = TEXTS[:7]
    wanted = EarlyExitClassifier(bundle).predict_proba(texts, threshold=2.0)
    np.testing.assert_allclose(probabilities(bundle, texts, ("bad", "good")), wanted, atol=1e-5)
    turned = probabilities(bundle, texts, ("good", "bad"))
    np.testing.assert_allclose(turned, wanted[:, ::-1], atol=1e-5)
    assert np.ptp(wanted) > 0.05


def read(path: Path, **fields: object) -> tuple[list[Example], tuple[str, ...]]:
    config = DataConfig(path=str(tiny.data()), unlabelled=str(path), **fields)
    return read_unlabelled(config, load(config)["train"])


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    texts = [text.replace("\t", " ") for text in TEXTS[:5]]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "b.tsv").write_text("id\ttext\n" + "".join(f"7\t{text}\n" for text in texts))
    (tmp_path / "c.csv").write_text("text,class\n" + "".join(f"{text},x\n" for text in texts))
    rows = "".join(json.dumps({"text": text, "label": 1.5}) + "\n" for text in texts)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "e.tsv").write_text("".join(f"bad\t{text}\n" for text in texts))
    ignored = {"c.csv": ("class",), "d.jsonl.gz": ("label",), "e.tsv": ("label",)}
    wanted = [Example(text, None, -1) for text in texts]
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == (wanted, ignored.get(path.name, ())), path
    some, _ = read(tmp_path / "a.txt", limit=3)
    assert len(some) == 3
    assert [row for row in wanted if row in some] == some
    # A txt has no columns to be named.
    table = tmp_path / "f.csv"
    table.write_text("label,note\n" + "".join(f"{label},{text}\n" for label, text in FEW))
    config = DataConfig(
        train=str(table), text_columns=("note",), unlabelled=str(tmp_path / "a.txt")
    )
    assert read_unlabelled(config, load(config)["train"])[0] == wanted


def test_pairs_of_the_comparison_come_back(tmp_path: Path) -> None:
    """Each row of train at most once, with its label or without."""
    table = tmp_path / "train.tsv"
    table.write_text(
        "label\tpremise\thypothesis\n" + "".join(f"{i % 3}\ta {i}\tb {i}\n" for i in range(29))
    )
    whole = TrainConfig(data=DataConfig(path=str(tmp_path)))
    folder, rows = write_files(whole, 11, 7, tmp_path / "data")
    config = DataConfig(path=str(folder), unlabelled=str(folder / "unlabelled.jsonl"))
    train = load(config)["train"]
    texts, ignored = read_unlabelled(config, train)
    assert (rows, len(train), len(texts), ignored) == (18, 11, 7, ())
    every = [row.inputs for row in (*train, *texts)]
    assert len({*every}) == 18
    assert {*every} <= {(f"a {i}", f"b {i}") for i in range(29)}
    assert all(int(row.text[2:]) % 3 == row.label for row in train)
    (folder / "more.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"more.txt has 1 text columns \(text\), train has 2"):
        read_unlabelled(dataclasses.replace(config, unlabelled=f"{folder}/more.txt"), train)


def test_labels_in_the_texts_are_said_to_be_ignored(tmp_path: Path) -> None:
    texts = tiny.write_tsv(tmp_path / "more.tsv", tiny.rows(9, 3))
    config = TrainConfig(data=DataConfig(path=str(tiny.data()), unlabelled=str(texts)))
    said = io.StringIO()
    rows = with_unlabelled(load(config.data)["train"], config, Console(file=said, width=500))
    assert [row.label for row in rows[-9:]] == [-1] * 9
    assert f"9 unlabelled rows: {texts} (its column label is not read)" in " ".join(
        said.getvalue().split()
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("more.txt", "", "more.txt has no rows."),
        ("more.tsv", "a\tb\nx\ty\n", "more.tsv: which column holds the text? Its columns: a, b."),
        ("more.xlsx", "{}", "more.xlsx: cannot tell the format by the ending."),
        ("more.tsv", "text\nfine film\na\tb\n", "more.tsv, line 3: expected 1 columns (text)"),
        ("pairs.tsv", "text_a\ttext_b\nx\ty\n", "pairs.tsv has 2 text columns (text_a, text_b), "
         "train has 1 (text)."),
        ("more.jsonl", '{"text": 3}\n', "more.jsonl, line 1: column 'text' must hold text. Got 3."),
    ],
)  # fmt: skip
def test_texts_that_do_not_fit(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    args = [*tiny.train_args(tmp_path / "bundle"), "distillation=1"]
    assert expected in tiny.refused(*args, "--unlabelled", tmp_path / name)
    assert not (tmp_path / "bundle.work").exists()


def test_settings_that_cannot_teach(tmp_path: Path) -> None:
    args, texts = tiny.train_args(tmp_path / "bundle"), lines(tmp_path / "more.txt")
    sentence = "distillation must be above 0 with a teacher or unlabelled texts. Got 0."
    assert sentence in tiny.refused(*args, "--unlabelled", texts)  # tiny.FIELDS set it to 0
    assert sentence in tiny.refused(*args, "--teacher", tiny.trained()[0])
    args = [*args, "distillation=1"]
    assert "layers must name two layers or more. Got (0, 3)." in tiny.refused(
        *args, "--unlabelled", texts, "layers=0,3"
    )
    assert f"{tmp_path} is not a whole bundle" in tiny.refused(*args, "--teacher", tmp_path)
    folder = tiny.copy_of_bundle(tmp_path / "other")
    bundle = load_bundle(folder)
    save_bundle(dataclasses.replace(bundle, labels=("bad", "fine")), folder)
    assert tiny.refused(*args, "--teacher", folder) == (
        f"teacher {folder} must have the labels bad, good. Got bad, fine."
    )
    folder = tiny.copy_of_bundle(tmp_path / "pairs")
    provenance = bundle.provenance | {"text_columns": ["question", "answer"]}
    save_bundle(dataclasses.replace(bundle, provenance=provenance), folder)
    assert tiny.refused(*args, "--teacher", folder) == (
        f"teacher {folder} must be trained on 1 text columns (text). Got 2 (question, answer)."
    )
    assert not (tmp_path / "bundle.work").exists()


def test_the_comparison_takes_as_many_steps_without_the_texts(tmp_path: Path, capsys) -> None:
    output = tmp_path / "teacher.json"
    args = [
        "--data", tiny.data(), "--labelled", 21, "--unlabelled", 50, "--model", tiny.model(),
        "--teacher", tiny.trained()[0], "--workdir", tmp_path / "runs", "--output", output,
        *tiny.FIELDS, "distillation=1", "epochs=3", "batch_size=8", "layers=1,3",
    ]  # fmt: skip
    assert run(app, "train.teacher", list(map(str, args))) == 0
    found = json.loads(output.read_text())
    assert (found["labelled"], found["unlabelled"]) == (21, 50)
    with_more, without = found["runs"].values()
    assert (with_more["steps"], without["steps"]) == (27, 27)
    assert without["config"]["epochs"] == 9
    assert not without["config"]["teacher"]
    assert {*with_more["accuracy"]["test"]} == {"1", "3"}
    assert f"{with_more['accuracy']['test']['3']:.4f}" in capsys.readouterr().out
    args[args.index("--labelled") + 1] = 96
    assert run(app, "train.teacher", list(map(str, args))) == 2
    assert "train must have more than 96 rows (--labelled). Got 96." in capsys.readouterr().err
