"""From a config to the model, its first parameters and the rows: the one way there.

`load_encoder`, `exits_of` and `build` are the path to the model, for a training, for `train.joint`
and, from shapes alone, for `train.aot`; `set_up` adds the rows of a training.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from rich.console import Console

from ejax import assets, storage
from ejax.bundle import WHOLE_TOKENS, Bundle
from ejax.bundle_files import ledger_behind
from ejax.card import exits_in_words
from ejax.config import BertConfig, ExitConfig, Pooling, TrainConfig, epochs_of
from ejax.data import sources
from ejax.data.batches import Step, eval_plan, worth_compiling
from ejax.data.frames import Table
from ejax.data.rows import TokenizedSplit, encode
from ejax.data.tokenizer import Encoded, Tokenizer, load_tokenizer
from ejax.data.unlabelled import read_unlabelled
from ejax.errors import UserError
from ejax.hardware import fastest_dtype
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.weights import load_bert, with_pretrained
from ejax.provenance import PICKED, TRAINED, UNKNOWN_BEHIND, Ledger
from ejax.saving import check_output
from ejax.training.checkpoint import claim_workdir
from ejax.training.checks import unknown_words, warn
from ejax.training.processes import made_by_first
from ejax.training.teacher import load_teacher, probabilities

MOST_NAMED = 20  # labels
# Of scores: the least standard deviation, whose square float32 holds, and of how many steps of
# float32 at the largest score it must be, so that rounding is far below any model's error.
LEAST_SPREAD, FEWEST_STEPS = 1e-15, 1000


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a training starts from."""

    given: TrainConfig
    config: TrainConfig  # the same, its class weights in numbers
    splits: dict[str, sources.Split]  # as read: "train", "dev", and "test" where there is one
    labels: tuple[str, ...]
    whole_cfg: BertConfig  # of the pretrained encoder
    cfg: BertConfig  # of the layers kept
    bert: Any  # the pretrained parameters
    tokenizer: Tokenizer
    exits: ExitConfig
    model: EarlyExitBert  # its exits after layers
    max_length: int
    buckets: tuple[int, ...]  # of the batches of this training
    train: TokenizedSplit
    held_out: dict[str, TokenizedSplit]  # "dev_a", "dev_b", and "test" where there is one
    behind: Ledger  # the rows of the model and the teacher

    def eval_plan(self, encoded: Encoded, batch_size: int) -> list[Step]:
        """Batches of rows that nothing is learnt from, by the buckets of this training."""
        return eval_plan(
            encoded.lengths, buckets=self.buckets, max_length=self.max_length,
            batch_size=batch_size,
        )  # fmt: skip


def set_up(
    config: TrainConfig,
    workdir: Any,
    console: Console,
    given: Mapping[str, Table] | None = None,
) -> Setup:
    """Reads, checks and tokenises all that a training needs, and claims the workdir for it.

    Args:
      given: rows of Python by split, instead of the files that the config names.

    Raises:
      ValueError: on bad data, a bad config, or a workdir of another config. Nothing is written
        before all is checked.
    """
    splits = sources.load(config.data, seed=config.seed, given=given)
    labels = splits["train"].labels
    whole_cfg, bert, tokenizer = load_encoder(config)
    behind = ledger_behind(assets.resolve(config.model))
    teacher = None
    if config.teacher:
        teacher = load_teacher(config.teacher, splits["train"], whole_cfg.dtype)
        behind = behind.merged(teacher.ledger.behind(picked=[*PICKED, "calibration"]))
    if not behind.complete:
        warn(UNKNOWN_BEHIND)
    train_rows = with_unlabelled(splits["train"], config, console)
    pooled = with_pooling(config, pairs=len(splits["train"].text_columns) == 2)
    scores = scores_of(splits["train"])
    exits = exits_of(pooled, whole_cfg, len(labels), scores, tokenizer.separator)
    model = build(config, whole_cfg, exits)
    check_teaching(config, exits)
    max_length = min(config.data.max_length, whole_cfg.max_position_embeddings)
    with console.status("tokenising"):
        whole = WHOLE_TOKENS if exits.has_zero else 0

        def tokenised(texts: Sequence[Any]) -> Encoded:
            return tokenizer.encode(texts, max_length, whole=whole)

        every_row: dict[str, Iterable[sources.Example]] = {**splits, "train": train_rows}
        tokens = {
            name: encode(rows, tokenised, splits["train"]) for name, rows in every_row.items()
        }
    train = tokens["train"]
    check_ids(config.model, tokenizer, train.encoded, model.cfg)
    warn(unknown_words(tokenizer, train.encoded, train_rows))
    hashes = [row for name in ("dev", "test") if name in tokens for row in tokens[name].hashes]
    trained = behind.among(hashes, TRAINED).union(train.hashes)
    picked = behind.among(hashes, ["picked"])
    held_out = held_out_parts(tokens, config, trained, picked, console=console)
    claim_workdir(workdir, pooled, {name: split.fingerprint() for name, split in tokens.items()})
    console.print(in_words(splits, exits, train, max_length), markup=False)  # of [brackets]
    if teacher:
        train = taught(train, train_rows, teacher, labels, workdir, console)
    buckets = worth_compiling(
        train.encoded.lengths, config.data.buckets, max_length,
        epochs_of(config, len(train.labels)),
    )  # fmt: skip
    return Setup(
        config, with_weights(config, train.labels, len(labels)), splits, labels, whole_cfg,
        model.cfg, bert, tokenizer, exits, model, max_length, buckets, train, held_out, behind,
    )  # fmt: skip


# From a config to the model


def numerics(config: TrainConfig, dtype: str) -> dict[str, Any]:
    """The fields of `BertConfig` that a run sets; `dtype` is what "auto" stands for."""
    return {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "dtype": dtype if config.dtype == "auto" else config.dtype,
        "residual_dtype": config.residual_dtype,
    }


def load_encoder(config: TrainConfig) -> tuple[BertConfig, Any, Tokenizer]:
    """The pretrained encoder with the run's dropout and numerics, and its tokenizer."""
    if not config.model:
        raise UserError("model must be a Hugging Face folder, a hub id or a known name. Got ''.")
    cfg, bert = load_bert(config.model, **numerics(config, fastest_dtype()))
    return cfg, bert, load_tokenizer(assets.resolve(config.model))


def with_pooling(config: TrainConfig, *, pairs: bool) -> TrainConfig:
    """What "auto" stands for: `pair` where rows are pairs of texts, else `mean`.

    Raises:
      ValueError: for `pair` of single texts.
    """
    if config.pooling == "pair" and not pairs:
        raise UserError("pooling pair is for rows of two texts. Got rows of one: use mean.")
    if config.pooling != "auto":
        return config
    return dataclasses.replace(config, pooling="pair" if pairs else "mean")


def exits_of(
    config: TrainConfig,
    cfg: BertConfig,
    classes: int,
    scores: tuple[float, float] = (0.0, 1.0),
    separator: tuple[int, ...] = (),
) -> ExitConfig:
    """The exits of a run; where none are asked for, before the first layer and after each.

    The config says what they read, see `with_pooling`. A regression has none before the first.

    Args:
      scores: of a regression, their mean and standard deviation.
      separator: see `Tokenizer.separator`.

    Raises:
      ValueError: on weights of another number than the exits or classes.
    """
    problem = config.data.problem_type
    first = int(problem == "regression")
    layers = config.layers or tuple(range(first, cfg.num_hidden_layers + 1))
    exits = ExitConfig(
        layers, classes, cast(Pooling, config.pooling), config.mix, problem_type=problem,
        separator=separator if config.pooling == "pair" else (),
        center=scores[0], spread=scores[1],
    )  # fmt: skip
    for what in ("teacher", "class_weights"):
        if getattr(config, what) and problem != "single_label_classification":
            raise UserError(f"{what} is for single labels. Got problem_type {problem}.")
    for name, weights, count in (
        ("exit_weights", config.exit_weights, len(exits.encoder.layers)),
        ("class_weights", config.class_weights, classes),
    ):
        if weights and weights != "balanced" and len(weights) != count:
            raise UserError(f"{name} must hold {count} weights. Got {len(weights)}: {weights}.")
    return exits


def with_weights(config: TrainConfig, labels: np.ndarray, classes: int) -> TrainConfig:
    """The class weights in numbers: balanced are N / (C * rows of the class).

    As in scikit-learn (King and Zeng, "Logistic Regression in Rare Events Data", 2001).

    Args:
      labels: int [N], -1 for a row without one, which does not count.
    """
    if config.class_weights != "balanced":
        return config
    rows = np.bincount(labels[labels >= 0], minlength=classes)
    weights = rows.sum() / (classes * np.maximum(rows, 1))
    return dataclasses.replace(config, class_weights=tuple(weights.tolist()))


def scores_of(train: sources.Split) -> tuple[float, float]:
    """The mean and standard deviation of the scores of a regression; (0, 1) of labels.

    Raises:
      ValueError: where all scores are the same, or so nearly that float32 cannot tell them apart.
    """
    if train.problem_type != "regression":
        return 0.0, 1.0
    scores = np.array([row.label for row in train], np.float64)
    if np.ptp(scores) == 0:
        raise UserError(f"{train.origin}: all scores are {scores[0]:g}: there is nothing to learn.")
    center, spread = float(scores.mean()), float(scores.std())
    if spread < max(LEAST_SPREAD, FEWEST_STEPS * np.spacing(np.float32(np.abs(scores).max()))):
        raise UserError(
            f"{train.origin}: scores must differ by more than their size allows in float32. Got "
            f"a mean of {center:g} and a standard deviation of {spread:g}: subtract the mean from "
            f"all scores, or multiply them."
        )
    return center, spread


def build(config: TrainConfig, cfg: BertConfig, exits: ExitConfig) -> EarlyExitBert:
    """The model that the steps train: the layers up to the last exit, without exit 0."""
    return EarlyExitBert(cut(cfg, exits), exits.encoder, config.remat, config.gradient_stop)


def initial_params(model: EarlyExitBert, bert: Any, config: TrainConfig) -> Any:
    """The pretrained encoder under fresh heads; with pooling "cls" they start from its pooler."""

    def init(key: jax.Array) -> Any:
        return model.init(key, Batch([[0, 0]]))["params"]

    key = jax.random.key(config.seed)
    encoder = jax.eval_shape(init, key)["bert"]  # its numbers come from `bert`
    heads = jax.jit(lambda key: init(key)["heads"])(key)
    variables = {"params": {"bert": encoder, "heads": heads}}
    return with_pretrained(variables, bert, pooler=config.pooling == "cls")["params"]


def shapes_of(model: EarlyExitBert) -> Any:
    """The parameters as shapes and types."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), Batch([[0, 0]]))["params"])


def blank_params(model: EarlyExitBert) -> Any:
    """Zeros of the shapes of the parameters, for a checkpoint to be read into."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes_of(model))


# The rows


def with_unlabelled(
    train: sources.Split, config: TrainConfig, console: Console
) -> list[sources.Example]:
    """All rows to learn from: those of train, and after them those without a label."""
    rows = list(train)
    if config.data.unlabelled:
        more, ignored = read_unlabelled(config.data, train)
        unread = f" (its column {', '.join(ignored)} is not read)" if ignored else ""
        console.print(
            f"{len(more)} unlabelled rows: {config.data.unlabelled}{unread}", markup=False
        )
        rows += more
    return rows


def taught(
    train: TokenizedSplit,
    rows: Sequence[sources.Example],
    teacher: Bundle,
    labels: Sequence[str],
    workdir: Any,
    console: Console,
) -> TokenizedSplit:
    """Train with what the teacher says of its rows; asked once, see `made_by_first`."""
    with console.status(f"the teacher, on {len(rows)} rows"):
        said = made_by_first(
            workdir / "teacher.safetensors",
            lambda: {"probabilities": probabilities(teacher, [row.inputs for row in rows], labels)},
        )
    return dataclasses.replace(train, teacher=said["probabilities"])


def held_out_parts(
    tokens: dict[str, TokenizedSplit],
    config: TrainConfig,
    trained: set[str],
    picked: Iterable[str],
    *,
    console: Console,
) -> dict[str, TokenizedSplit]:
    """dev_a less the rows that trained, dev_b and test less those that picked the weights too."""
    given = "train or unlabelled" if config.data.unlabelled else "train"
    models = f"{config.model} or {config.teacher}" if config.teacher else config.model

    def unseen(shown: str, split: TokenizedSplit, seen: set[str], why: str) -> TokenizedSplit:
        rows = split.without(seen, f"every row of {shown} is {why}: give other rows.")
        if left_out := len(split.labels) - len(rows):
            console.print(f"{left_out} rows of {shown} are left out: they are {why}", markup=False)
        return split.take(rows)

    dev = tokens["dev"]
    half_a, half_b = sources.split_dev(len(dev.labels), config.seed)
    dev_a = unseen("dev-A", dev.take(half_a), trained, f"in {given}, or trained {models}")
    seen = trained.union(picked, dev_a.hashes)
    why = f"in {given} or dev-A, or trained or picked {models}"
    parts = {"dev_a": dev_a, "dev_b": unseen("dev-B", dev.take(half_b), seen, why)}
    if "test" in tokens:
        parts["test"] = unseen("test", tokens["test"], seen, why)
    return parts


def in_words(
    splits: dict[str, sources.Split], exits: ExitConfig, train: TokenizedSplit, max_length: int
) -> str:
    """What is trained on what, for people; of many labels the first ones and their number."""
    rows = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    labels = splits["train"].labels
    names = ", ".join(labels[:MOST_NAMED])
    more = "" if len(labels) <= MOST_NAMED else f", … ({len(labels)})"
    filled = (train.encoded.lengths == max_length).mean()
    cut_off = (
        f"; {filled:.0%} of train fill or pass {max_length} tokens, where texts are cut"
        if filled > 0
        else ""
    )
    compared = ", whose heads compare the two texts" if exits.pooling == "pair" else ""
    return f"{rows} rows; labels: {names}{more}; exits {exits_in_words(exits)}{compared}{cut_off}"


# What is refused


def places(workdir: str | Path, output: str | Path | None) -> tuple[Any, Path]:
    """The workdir and the bundle's folder, `workdir/bundle` where none is given.

    Raises:
      ValueError: where they cannot be that, or thresholds chosen since would be lost.
    """
    workdir = storage.path_of(workdir)
    bundle = check_output(output or workdir / "bundle")
    check_apart(bundle, workdir)
    check_not_changed(bundle)
    return workdir, bundle


def check_apart(output: Path, workdir: Path) -> None:
    """Raises ValueError where the bundle's folder would be or hold the workdir."""
    bundle, work = (p if storage.is_remote(p) else p.absolute() for p in (output, workdir))
    if bundle == work or bundle in work.parents:
        raise UserError(
            f"the bundle's folder must not be or hold the workdir {workdir}: choose another "
            f"output, such as {workdir / 'bundle'}. Got {output}."
        )


def check_not_changed(bundle: Path) -> None:
    """Raises ValueError where a run would replace what was chosen for a bundle since."""
    with storage.reaching(bundle):
        if not (bundle / "exits.json").exists():
            return
        content = (bundle / "exits.json").read_bytes()
    try:
        provenance = json.loads(content)["provenance"]
        since = [name for name in ("calibrated", "target", "abstain") if name in provenance]
    except (ValueError, LookupError, TypeError, RecursionError):
        since = []  # damaged: the run writes a new one
    if since:
        raise UserError(
            f"{bundle} has other thresholds since its training ({', '.join(since)} in its "
            f"exits.json), which would be lost: choose another output, or move it away."
        )


def check_teaching(config: TrainConfig, exits: ExitConfig) -> None:
    """Raises ValueError where a teacher or unlabelled texts would teach nothing."""
    if config.distillation == 0 and (config.teacher or config.data.unlabelled):
        raise UserError("distillation must be above 0 with a teacher or unlabelled texts. Got 0.")
    if config.data.unlabelled and not config.teacher and len(exits.encoder.layers) < 2:
        raise UserError(
            "unlabelled texts without a teacher are taught by the last exit to those before it: "
            f"layers must name two layers or more. Got {exits.layers}."
        )


def check_ids(model: str, tokenizer: Tokenizer, encoded: Encoded, cfg: BertConfig) -> None:
    """An id or type beyond its embedding table would give NaN, silently."""
    for what, largest, size in (
        ("vocabulary", tokenizer.vocab_size - 1, cfg.vocab_size),
        ("token types", int(encoded.types.max(initial=0)), cfg.type_vocab_size),
    ):
        if largest >= size:
            raise UserError(
                f"{model}: {what} of the tokenizer go up to {largest}, the model embeds {size}: "
                f"tokenizer and data must fit the model."
            )
