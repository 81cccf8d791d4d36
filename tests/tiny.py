"""A tiny real BERT, tiny labelled files, and a bundle trained on them, for tests of the whole path.

One word decides the class, so that a few steps teach it.
"""

import contextlib
import dataclasses
import functools
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from safetensors.numpy import save_file

from ejax.bundle import Bundle, load_bundle
from ejax.calibration.drift import depth_of
from ejax.cli.app import app
from ejax.cli.run import run
from ejax.config import BertConfig, to_json
from ejax.models.bert import Batch, BertModel
from ejax.models.weights import to_hf
from ejax.saving import save_bundle

CLASSES = {"bad": ("awful", "poor"), "good": ("great", "fine")}
FILLERS = ("the", "film", "plot", "was", "is", "music", "and", "a", "cast", "tonight")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, *FILLERS, *(word for words in CLASSES.values() for word in words))
CFG = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=28,
    max_position_embeddings=32,
)
FIELDS = (  # of a random encoder the last exit teaches the first one nothing
    "distillation=0.0", "epochs=12", "batch_size=16", "learning_rate=0.003", "dropout=0.0",
    "evals=4", "head_learning_rate=0.03", "dtype=float32", "data.max_length=16", "data.buckets=16",
)  # fmt: skip

_home = tempfile.TemporaryDirectory(prefix="ejax-tiny-")  # removed when Python ends
HOME = Path(_home.name)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def ejax(*args: object) -> Result:
    """The `ejax` command, in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(app, "ejax", [str(arg) for arg in args])
    out.seek(0)
    return Result(code, out.read(), err.getvalue())


def refused(*args: object) -> str:
    """The one sentence with which the command refuses."""
    result = ejax(*args)
    assert result.code == 2, result
    assert result.out == ""
    sentence = result.err.strip().rpartition("\n")[2]
    assert sentence.startswith("ejax: "), result.err
    assert "Traceback" not in result.err
    return sentence.removeprefix("ejax: ")


def command(*args: object, before: str = "") -> list[str]:
    """The `ejax` command for a process of its own."""
    code = f"{before}\nfrom ejax.cli import main\nmain()"
    return [sys.executable, "-c", code, *map(str, args)]


def process(*args: object, before: str = "") -> Result:
    done = subprocess.run(
        command(*args, before=before), capture_output=True, text=True, timeout=600
    )
    return Result(done.returncode, done.stdout, done.stderr)


def rows(count: int, seed: int, *, wrong: int = 0) -> list[tuple[str, str]]:
    """(label, text), half of each class; with `wrong`, every so many-th label is wrong."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        label = sorted(CLASSES)[i % 2]
        words = draw.choices(FILLERS, k=draw.randint(2, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(CLASSES[label]))
        flip = wrong > 0 and i % wrong == wrong - 1
        made.append((sorted(CLASSES)[(i + flip) % 2], " ".join(words)))
    return made


def write_tsv(path: Path, labelled: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{label}\t{text}\n" for label, text in [("label", "text"), *labelled]))
    return path


@functools.cache
def model() -> Path:
    """A random encoder of 3 layers, saved as Hugging Face saves it.

    As in a pretrained one, words differ more than places do: else no head could tell them apart.
    """
    folder = HOME / "model"
    folder.mkdir()
    params = jax.jit(BertModel(CFG).init)(jax.random.key(0), Batch([[0, 0]]))["params"]
    word = params["embeddings"]["word"]
    word["embedding"] = 50 * word["embedding"]
    save_file(to_hf(params, CFG), folder / "model.safetensors", metadata={"format": "pt"})
    config = to_json(CFG) | {"model_type": "bert"}
    del config["dtype"], config["residual_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@functools.cache
def data() -> Path:
    """A folder with train, dev and test, tsv."""
    folder = HOME / "data"
    folder.mkdir()
    for seed, (name, count) in enumerate({"train": 96, "dev": 41, "test": 30}.items()):
        wrong = 0 if name == "train" else 7  # without errors a temperature has no minimum
        write_tsv(folder / f"{name}.tsv", rows(count, seed, wrong=wrong))
    return folder


def train_args(output: Path) -> list[object]:
    files = [item for name in ("train", "dev", "test") for item in (f"--{name}", file(name))]
    return ["train", "--model", model(), *files, "--output", output, "--layers", "1,3", *FIELDS]


def file(name: str) -> Path:
    return data() / f"{name}.tsv"


@functools.cache
def trained() -> tuple[Path, Result]:
    """The bundle that `ejax train` made, not to be changed, and what it said."""
    folder = HOME / "bundle"
    result = ejax(*train_args(folder))
    assert result.code == 0, result.err
    return folder, result


@functools.cache
def problem_data(problem: str) -> Path:
    """A folder with train, dev and test, jsonl, of several labels per text or of numbers."""
    folder = HOME / problem
    folder.mkdir()
    draw = random.Random(7)
    marks = [*CLASSES.items(), ("music", ("music",))]
    for name, count in {"train": 160, "dev": 81, "test": 60}.items():
        lines = []
        for _ in range(count):
            words = draw.choices(FILLERS, k=draw.randint(2, 7))
            for _, of_class in marks[:2]:
                words += [draw.choice(of_class)] * (draw.random() < 0.5)
            draw.shuffle(words)
            names = [label for label, of_class in marks if {*of_class} & {*words}]
            score = 10 + 2 * ("good" in names) - 3 * ("bad" in names) + draw.gauss(0, 0.1)
            if name != "train" and draw.random() < 0.1:  # without errors nothing is to calibrate
                names, score = names[1:], score + 2
            label = score if problem == "regression" else names
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@functools.cache
def trained_on(problem: str) -> tuple[Path, Result]:
    """As `trained`, of another problem type: of several labels with an exit 0."""
    folder, layers = HOME / f"bundle-{problem}", "1,3" if problem == "regression" else "0,1,3"
    result = ejax(
        "train", "--model", model(), "--output", folder, "--layers", layers, "--problem-type",
        problem, *FIELDS, f"data.path={problem_data(problem)}",
    )  # fmt: skip
    assert result.code == 0, result.err
    return folder, result


def rows_of(bundle: Bundle) -> Mapping[str, frozenset[str]]:
    """Salted hashes of the rows of its last training and since, by what they did."""
    return bundle.ledger.trainings[-1].rows


def careful(folder: Path) -> Path:
    """A copy with a threshold of 0.68, at which all of 20 rows left after layer 1, saved there."""
    bundle, thresholds = load_bundle(trained()[0]), (0.68, 0.0)
    depth = depth_of({"rows": 20, "exit_share": [1.0, 0.0], "threshold": thresholds})
    provenance = bundle.provenance | {"depth": depth}
    changed = dataclasses.replace(bundle, thresholds=thresholds, provenance=provenance)
    return save_bundle(changed, folder / "careful")


def copy_of_bundle(folder: Path) -> Path:
    return Path(shutil.copytree(trained()[0], folder / "bundle"))
