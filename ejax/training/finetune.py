"""Fine-tuning from a config to a bundle.

Train all exits together, keep the best checkpoint by dev-A, fit temperatures and
choose the default thresholds on dev-A, report on dev-B and test.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ejax import assets, storage
from ejax.bundle import (
    WHOLE_TOKENS,
    Bundle,
    check_output,
    exits_in_words,
    ledger_behind,
    save_bundle,
)
from ejax.calibration.calibrate import Answers, calibrate
from ejax.calibration.drift import depth_of
from ejax.calibration.metrics import accuracy
from ejax.config import BertConfig, ExitConfig, TrainConfig, epochs_of, to_json
from ejax.data import sources
from ejax.data.batches import Step, eval_plan, take, train_plan, worth_compiling
from ejax.data.tokenizer import Encoded, Tokenizer, load_tokenizer
from ejax.data.unlabelled import read_unlabelled
from ejax.hardware import environment, fastest_dtype
from ejax.inference.cost import zero_in_layers
from ejax.models.bert import Batch
from ejax.models.early_exit import EarlyExitBert, cut
from ejax.models.ngrams import packed_table, ragged_logits, unpacked_table
from ejax.models.weights import load_bert, with_pretrained
from ejax.provenance import PICKED, TRAINED, UNKNOWN_BEHIND
from ejax.rivals import below_rival
from ejax.training.checkpoint import METRIC, Checkpoints, alone_in, claim_workdir
from ejax.training.checks import no_better_than_chance, still_rising, unknown_words, warn
from ejax.training.log import Log, check_finite
from ejax.training.ngrams import fit_ngrams
from ejax.training.optim import make_optimizer
from ejax.training.parallel import make_all_logits, parallel_step, place
from ejax.training.processes import Stopped, Terminated, barrier, made_by_first
from ejax.training.step import Rows, first_state, make_train_step
from ejax.training.teacher import load_teacher, probabilities
from ejax.training.warm import warm_heads

LOG_STEPS = 20
WARM_ROWS = 10_000  # of train, whose vectors the heads start on
EMBEDDED_ROWS = 32  # of these at a time
MOST_NAMED = 20  # labels
ZERO_SAVES = 0.02  # of the layers run on dev-A, for exit 0 to be kept


@dataclasses.dataclass(frozen=True)
class Task:
    """A split, tokenised."""

    encoded: Encoded
    labels: np.ndarray  # int32 [N], -1 for a row without one
    hashes: list[str]  # one per row
    teacher: np.ndarray | None = None  # its probabilities, float32 [N, C]

    def take(self, rows: np.ndarray) -> "Task":
        hashes = [self.hashes[row] for row in rows]
        teacher = None if self.teacher is None else self.teacher[rows]
        return Task(self.encoded.subset(rows), self.labels[rows], hashes, teacher)

    def teaching(self) -> "Task":
        """The rows that teach a head by itself: all with a teacher, else those with a label."""
        return self if self.teacher is not None else self.take(np.flatnonzero(self.labels >= 0))

    def targets(self, classes: int, distillation: float) -> np.ndarray:
        """What each class weighs in a row's cross-entropy, by label and teacher: [N, C]."""
        by_label = (self.labels[:, None] == np.arange(classes)).astype(np.float64)
        return by_label if self.teacher is None else by_label + distillation * self.teacher

    def without(self, seen: set[str], refusal: str) -> np.ndarray:
        """The numbers of the rows whose hashes are not in `seen`: int [N].

        Raises:
          ValueError: `refusal`, where none are left.
        """
        kept = np.array([i for i, name in enumerate(self.hashes) if name not in seen], int)
        if not len(kept):
            raise ValueError(refusal)
        return kept

    def fingerprint(self) -> str:
        """16 hex digits of the sha256 over the rows' hashes and labels."""
        rows = zip(self.hashes, self.labels.tolist(), strict=True)
        content = " ".join(f"{name} {label}" for name, label in rows)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def finetune(
    config: TrainConfig,
    workdir: str | Path,
    *,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Trains, calibrates and saves a bundle; called again, it resumes where it was.

    Args:
      config: everything the result depends on.
      workdir: checkpoints, metrics.jsonl, TensorBoard files and result.json go here; a
        folder that all hosts share, or gs://.
      output: the bundle's folder; None means workdir/bundle.
      console: where progress is shown; None means standard error.

    Returns:
      The bundle's folder.

    Raises:
      ValueError: on bad data, a bad config, or a workdir of another config.
      Stopped: after SIGTERM, once all is saved.
    """
    first_host = jax.process_index() == 0
    workdir, console = (
        storage.path_of(workdir),
        console or Console(stderr=True, quiet=not first_host),
    )
    output = check_output(output or workdir / "bundle")
    check_apart(output, workdir)
    check_not_changed(output)
    started = time.time()
    splits = sources.load(config.data, seed=config.seed)
    labels = splits["train"].labels
    cfg, bert, tokenizer = load_model(config)
    behind = ledger_behind(assets.resolve(config.model))
    teacher = None
    if config.teacher:
        teacher = load_teacher(config.teacher, splits["train"], cfg.dtype)
        behind = behind.merged(teacher.ledger.behind(picked=[*PICKED, "calibration"]))
    if not behind.complete:
        warn(UNKNOWN_BEHIND)
    train_rows = with_unlabelled(splits["train"], config, console)
    exits = ExitConfig(
        config.layers or tuple(range(cfg.num_hidden_layers + 1)),
        len(labels),
        config.pooling,
        config.mix,
    )
    check_weights(config, exits)
    whole_cfg, cfg = cfg, cut(cfg, exits)
    check_teaching(config, exits)
    max_length = min(config.data.max_length, cfg.max_position_embeddings)
    with console.status("tokenising"):
        whole = WHOLE_TOKENS if exits.has_zero else 0

        def tokenised(texts: Sequence[Any]) -> Encoded:
            return tokenizer.encode(texts, max_length, whole=whole)

        read = splits | {"train": train_rows}
        tasks = {name: encode(rows, tokenised) for name, rows in read.items()}
    check_ids(config.model, tokenizer, tasks["train"].encoded, cfg)
    warn(unknown_words(tokenizer, tasks["train"].encoded, train_rows))
    hashes = [row for name in ("dev", "test") if name in tasks for row in tasks[name].hashes]
    trained = behind.among(hashes, TRAINED).union(tasks["train"].hashes)
    picked = behind.among(hashes, ["picked"])
    held_out = held_out_parts(tasks, config, trained, picked, console=console)
    claim_workdir(workdir, config, {name: task.fingerprint() for name, task in tasks.items()})
    longest = (tasks["train"].encoded.lengths == max_length).mean()
    console.print(
        f"{', '.join(f'{len(split)} {name}' for name, split in splits.items())} rows; "
        f"labels: {in_short(labels)}; exits {exits_in_words(exits)}"
        + (
            f"; {longest:.0%} of train fill or pass {max_length} tokens, where texts are cut"
            if longest > 0
            else ""
        ),
        markup=False,  # of labels and paths with [brackets]
    )
    if teacher:
        tasks["train"] = taught(tasks["train"], train_rows, teacher, labels, workdir, console)
    del teacher, train_rows  # their memory
    zero = trained_zero(tasks["train"], exits, config, workdir, console)
    model = EarlyExitBert(cfg, exits.encoder, config.remat, config.gradient_stop)
    all_logits = make_all_logits(model)
    buckets = worth_compiling(
        tasks["train"].encoded.lengths, config.data.buckets, max_length,
        epochs_of(config, len(tasks["train"].labels)),
    )  # fmt: skip
    micro_batch = -(-config.batch_size // (jax.device_count() * config.accumulate))

    def plan_of(task: Task) -> list[Step]:
        return eval_plan(
            task.encoded.lengths,
            buckets=buckets,
            max_length=max_length,
            batch_size=4 * micro_batch * jax.local_device_count(),  # hosts take turns
        )

    def logits_of(task: Task, params: Any) -> np.ndarray:
        return all_logits({"params": params}, task.encoded, plan_of(task))

    def dev_a(params: Any) -> dict[str, float]:
        truth, logits = held_out["dev_a"].labels, logits_of(held_out["dev_a"], params)
        per_exit = [accuracy(exit_logits.argmax(axis=-1), truth) for exit_logits in logits]
        names = [f"accuracy/layer_{layer}" for layer in exits.encoder.layers]
        trained = np.array(config.exit_weights or [1.0] * len(per_exit)) > 0
        mean = float(np.mean(np.array(per_exit)[trained]))
        return dict(zip(names, per_exit, strict=True)) | {METRIC: mean}

    def warm_start() -> Any:
        params = initial_params(model, bert, config)
        return warmed(model, params, tasks["train"], buckets, max_length, config, console)

    params, best, first, last = train(
        config, model, warm_start, tasks["train"], buckets, max_length, workdir, dev_a, console
    )
    with console.status("calibrating"):
        rows = held_out["dev_a"].encoded
        parts = {
            name: answers(task, zero, logits_of(task, params)) for name, task in held_out.items()
        }
        exits, parts, chosen = calibrated(
            exits, parts, config,
            exit0_cost=zero_in_layers(cfg, exits, rows.lengths, rows.whole_lengths),
            console=console,
        )  # fmt: skip
    if exits.has_zero:
        params = params | {"ngrams": zero}
    origins = {name: split.origin for name, split in splits.items()}
    if config.data.unlabelled:
        origins["unlabelled"] = short_path(config.data.unlabelled)
    bundle = Bundle(
        cfg,
        exits,
        {"params": params},
        tokenizer,
        labels,
        tuple(chosen["temperatures"]),
        tuple(chosen["thresholds"]),
        max_length,
        config.data.buckets,
        {name: chosen[name] for name in ("thresholds_from", "operating_points", "metrics")}
        | {
            "model": short_path(config.model),
            "teacher": short_path(config.teacher),
            "data": "; ".join(f"{name}: {origin}" for name, origin in origins.items()),
            "best_step": best,
            "depth": depth_of(chosen["operating_points"]["dev_b"]),  # dev-B chose nothing
            "text_columns": list(splits["train"].text_columns),
            "label_column": splits["train"].label_column,
            "config": to_json(public(config)),
            "versions": environment()["versions"],
        },
        behind.with_training(
            {name: task.hashes for name, task in (held_out | {"train": tasks["train"]}).items()}
        ),
    )
    if not first_host:
        barrier("the bundle is saved")
        return output
    save_bundle(bundle, output)
    with console.status("compared with a linear model on the frozen encoder"):
        labelled = tasks["train"].take(np.flatnonzero(tasks["train"].labels >= 0))
        warn_of_doubts(
            parts["dev_a"], exits, workdir,
            below_rival(
                labelled.encoded, labelled.labels, rows, parts["dev_a"].labels,
                parts["dev_a"].logits[-1].argmax(axis=-1) == parts["dev_a"].labels,
                cfg=whole_cfg, bert=bert, max_length=max_length,
            ),
        )  # fmt: skip
    result = {
        "config": to_json(public(config)),
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - started, 1),  # since `resumed_from_step`
        "resumed_from_step": first,
        "best_step": best,
        **{
            name: chosen[name]
            for name in ("temperatures", "thresholds", "metrics", "operating_points")
        },
        **environment(),
    }
    if first < last or not (workdir / "result.json").exists():  # else it is of the training itself
        storage.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    barrier("the bundle is saved")
    return output


def warn_of_doubts(dev_a: Answers, exits: ExitConfig, workdir: Any, *more: str) -> None:
    """Says what a result may be worth less for, one sentence each."""
    accuracies = [accuracy(logits.argmax(axis=-1), dev_a.labels) for logits in dev_a.logits]
    path = workdir / "metrics.jsonl"
    with storage.reaching(path):
        lines = path.read_text().splitlines() if path.exists() else []
    evaluated = [line for line in map(json.loads, lines) if line["kind"] == "dev_a"]
    for sentence in (
        still_rising([line[METRIC] for line in evaluated], len(dev_a.labels)),
        no_better_than_chance(exits.layers, accuracies, dev_a.labels),
        *more,
    ):
        warn(sentence)


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
    task: Task,
    rows: Sequence[sources.Example],
    teacher: Bundle,
    labels: Sequence[str],
    workdir: Any,
    console: Console,
) -> Task:
    """The task with what the teacher says of its rows; asked once, see `made_by_first`."""
    with console.status(f"the teacher, on {len(rows)} rows"):
        said = made_by_first(
            workdir / "teacher.safetensors",
            lambda: {"probabilities": probabilities(teacher, [row.inputs for row in rows], labels)},
        )
    return dataclasses.replace(task, teacher=said["probabilities"])


def check_apart(output: Path, workdir: Path) -> None:
    """Raises ValueError where the bundle's folder would be or hold the workdir."""
    bundle, work = (p if storage.is_remote(p) else p.absolute() for p in (output, workdir))
    if bundle == work or bundle in work.parents:
        raise ValueError(
            f"the bundle's folder must not be or hold the workdir {workdir}: choose another "
            f"output, such as {workdir / 'bundle'}. Got {output}."
        )


def check_not_changed(bundle: Path) -> None:
    """Raises ValueError where a run would replace what was chosen for a bundle since."""
    with storage.reaching(bundle):
        if not (bundle / "exits.json").exists():
            return
        text = (bundle / "exits.json").read_text()
    try:
        provenance = json.loads(text)["provenance"]
        since = [name for name in ("calibrated", "target", "abstain") if name in provenance]
    except (ValueError, LookupError, TypeError):  # damaged: the run makes its bundle anew
        since = []
    if since:
        raise ValueError(
            f"{bundle} has other thresholds since its training ({', '.join(since)} in its "
            f"exits.json), which would be lost: choose another output, or move it away."
        )


def load_model(config: TrainConfig) -> tuple[BertConfig, Any, Tokenizer]:
    """The pretrained encoder with the run's dropout and numerics, and its tokenizer."""
    if not config.model:
        raise ValueError("model must be a Hugging Face folder, a hub id or a known name. Got ''.")
    cfg, bert = load_bert(
        config.model,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        dtype=fastest_dtype() if config.dtype == "auto" else config.dtype,
        residual_dtype=config.residual_dtype,
    )
    return cfg, bert, load_tokenizer(assets.resolve(config.model))


def check_weights(config: TrainConfig, exits: ExitConfig) -> None:
    for name, weights, count in (
        ("exit_weights", config.exit_weights, len(exits.encoder.layers)),
        ("class_weights", config.class_weights, exits.num_labels),
    ):
        if weights and len(weights) != count:
            raise ValueError(f"{name} must hold {count} weights. Got {len(weights)}: {weights}.")


def check_teaching(config: TrainConfig, exits: ExitConfig) -> None:
    if config.distillation == 0 and (config.teacher or config.data.unlabelled):
        raise ValueError("distillation must be above 0 with a teacher or unlabelled texts. Got 0.")
    if config.data.unlabelled and not config.teacher and len(exits.encoder.layers) < 2:
        raise ValueError(
            "unlabelled texts without a teacher are taught by the last exit to those before it: "
            f"layers must name two layers or more. Got {exits.layers}."
        )


def encode(split: Any, tokenise: Callable[[Sequence[Any]], Encoded]) -> Task:
    """The rows of a split as `tokenise`, such as `Bundle.encode`, reads them."""
    rows = list(split)
    return Task(
        tokenise([row.inputs for row in rows]),
        np.asarray([row.label for row in rows], np.int32),
        [sources.row_hash(row) for row in rows],
    )


def held_out_parts(
    tasks: dict[str, Task],
    config: TrainConfig,
    trained: set[str],
    picked: Iterable[str],
    *,
    console: Console,
) -> dict[str, Task]:
    """dev_a less the rows that trained, dev_b and test less those that picked the weights too."""
    given = "train or unlabelled" if config.data.unlabelled else "train"
    models = f"{config.model} or {config.teacher}" if config.teacher else config.model

    def left(shown: str, task: Task, seen: set[str], why: str) -> Task:
        rows = task.without(seen, f"every row of {shown} is {why}: give other rows.")
        if gone := len(task.labels) - len(rows):
            console.print(f"{gone} rows of {shown} are left out: they are {why}", markup=False)
        return task.take(rows)

    dev = tasks["dev"]
    half_a, half_b = sources.split_dev(len(dev.labels), config.seed)
    dev_a = left("dev-A", dev.take(half_a), trained, f"in {given}, or trained {models}")
    seen = trained.union(picked, dev_a.hashes)
    why = f"in {given} or dev-A, or trained or picked {models}"
    parts = {"dev_a": dev_a, "dev_b": left("dev-B", dev.take(half_b), seen, why)}
    if "test" in tasks:
        parts["test"] = left("test", tasks["test"], seen, why)
    return parts


def blank_params(model: EarlyExitBert) -> Any:
    """Zeros of the shapes of the parameters, for a checkpoint to be read into."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), Batch([[0, 0]]))["params"])
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def initial_params(model: EarlyExitBert, bert: Any, config: TrainConfig) -> Any:
    """The pretrained encoder under fresh heads; with pooling "cls" they start from its pooler."""

    def init(key: jax.Array) -> Any:
        return model.init(key, Batch([[0, 0]]))["params"]

    key = jax.random.key(config.seed)
    encoder = jax.eval_shape(init, key)["bert"]  # its numbers come from `bert`
    heads = jax.jit(lambda key: init(key)["heads"])(key)
    variables = {"params": {"bert": encoder, "heads": heads}}
    return with_pretrained(variables, bert, pooler=config.pooling == "cls")["params"]


def trained_zero(
    task: Task, exits: ExitConfig, config: TrainConfig, workdir: Any, console: Console
) -> dict[str, np.ndarray]:
    """Exit 0's parameters, {} where there is none; trained once, see `made_by_first`."""
    if not exits.has_zero:
        return {}

    def fitted() -> dict[str, np.ndarray]:
        rows = task.teaching()
        assert rows.encoded.whole is not None
        params = fit_ngrams(
            rows.encoded.whole, rows.targets(exits.num_labels, config.distillation), exits,
            class_weights=config.class_weights, seed=config.seed,
        )  # fmt: skip
        return packed_table(params)

    with console.status("exit 0, on n-grams"):
        saved = made_by_first(workdir / "ngrams.safetensors", fitted)
    return unpacked_table(saved, exits)


def answers(task: Task, zero: dict[str, np.ndarray], logits: np.ndarray) -> Answers:
    """Every exit's, from the logits [E, N, C] of those after layers."""
    if zero:
        rows = task.encoded.whole
        assert rows is not None
        of_zero = ragged_logits(zero, rows.ids, rows.types, rows.offsets)
        logits = np.concatenate([of_zero[None], logits])
    return Answers(logits, task.labels, task.encoded.lengths)


def calibrated(
    exits: ExitConfig,
    parts: dict[str, Answers],
    config: TrainConfig,
    *,
    exit0_cost: float,
    console: Console,
) -> tuple[ExitConfig, dict[str, Answers], dict[str, Any]]:
    """Temperatures and thresholds, and the exits: without exit 0 where it saves next to nothing.

    That is decided on dev-A, and only where no exits were asked for.
    """

    def chosen(some: ExitConfig, of_parts: dict[str, Answers], cost: float) -> dict[str, Any]:
        return calibrate(
            of_parts, "dev_a", some.layers, max_drop=config.max_drop,
            where="dev-A, half of dev", exit0_cost=cost,
        )  # fmt: skip

    with_zero = chosen(exits, parts, exit0_cost)
    if not exits.has_zero or config.layers:
        return exits, parts, with_zero
    rest = {name: part._replace(logits=part.logits[1:]) for name, part in parts.items()}
    without = chosen(exits.encoder, rest, 0.0)
    depth, before = (c["operating_points"]["dev_a"]["mean_depth"] for c in (with_zero, without))
    helps = depth <= (1 - ZERO_SAVES) * before
    console.print(
        f"exit 0, on n-grams, is {'kept' if helps else 'left out'}: with it the default thresholds "
        f"run {depth:.2f} layers on dev-A, without it {before:.2f}"
    )
    return (exits, parts, with_zero) if helps else (exits.encoder, rest, without)


def in_short(labels: Sequence[str]) -> str:
    """Their names, of many the first ones and how many there are."""
    shown = ", ".join(labels[:MOST_NAMED])
    return shown if len(labels) <= MOST_NAMED else f"{shown}, … ({len(labels)})"


def warmed(
    model: EarlyExitBert,
    params: Any,
    task: Task,
    buckets: Sequence[int],
    max_length: int,
    config: TrainConfig,
    console: Console,
) -> Any:
    """The parameters with heads that fit the encoder as it is; the same on every host.

    Each host's first device runs batches of one size, so that the vectors have the same bits
    however many devices there are: heads are trained far enough to tell.
    """
    task = task.teaching()
    order = np.random.default_rng([config.seed, 2]).permutation(len(task.labels))
    some = task.take(np.sort(order[:WARM_ROWS]))
    lengths, device = some.encoded.lengths, jax.local_devices()[:1]
    plan = eval_plan(lengths, buckets=buckets, max_length=max_length, batch_size=EMBEDDED_ROWS)
    with console.status("the heads, on the encoder as it is"):
        vectors = make_all_logits(model, device, method="layer_vectors")(
            {"params": params}, some.encoded, plan
        )
        heads = warm_heads(model, params["heads"], vectors, some.labels, config, some.teacher)
        if jax.process_count() > 1:
            barrier("warmed")
            heads = multihost_utils.broadcast_one_to_all(heads)
    return params | {"heads": jax.tree.map(np.asarray, heads)}


def train(
    config: TrainConfig,
    model: EarlyExitBert,
    start: Callable[[], Any],
    task: Task,
    buckets: Sequence[int],
    max_length: int,
    workdir: Any,
    evaluate: Callable[[Any], dict[str, float]],
    console: Console,
) -> tuple[Any, int, int, int]:
    """Runs the steps that are left.

    Returns:
      The best checkpoint's parameters, its step, the step this run went on from, and the last,
      before the end where dev-A had not been better for `patience` evaluations.
    """

    def plan_of(epoch: int) -> list[Any]:
        return train_plan(
            task.encoded.lengths,
            buckets=buckets,
            max_length=max_length,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
        )

    per_epoch = -(-len(task.labels) // config.batch_size)
    total = epochs_of(config, len(task.labels)) * per_epoch
    evals = {-(-i * total // config.evals) for i in range(1, config.evals + 1)}
    optimizer = make_optimizer(config, total)
    run_step = parallel_step(
        make_train_step(model, optimizer, config),
        parallel=config.parallel,
        accumulate=config.accumulate,
    )

    def show(step: int, scores: dict[str, float]) -> None:
        cells = " ".join(f"{v:.3f}" for k, v in scores.items() if k != METRIC)
        console.print(f"step {step}: dev-A accuracy per exit {cells}")

    with (
        alone_in(workdir),
        Checkpoints(workdir) as checkpoints,
        Log(workdir) as log,
        Terminated() as terminated,
        progress_bar(console) as bar,
    ):
        params = start() if checkpoints.none else blank_params(model)
        state = place(first_state(params, optimizer, config), config.parallel)
        fresh = checkpoints.none
        first, state = checkpoints.restore_newest(state)
        log.cut(first)
        if not fresh:
            console.print(f"resuming {workdir} from step {first} of {total}", markup=False)
        best_score, best_step = checkpoints.best()
        scores: dict[str, float] | None
        if fresh:  # what training is to make better
            scores = evaluate(state.kept)
            best_score = scores[METRIC]
            log.write(0, "dev_a", scores)
            show(0, scores)
            log.sync()
            checkpoints.save(0, state, scores)
        last = first
        held: list[tuple[int, Step, dict[str, Any]]] = []
        shown = bar.add_task("training", total=total, completed=first)
        for step in range(first, total):
            since = sum(best_step < at <= step for at in evals)
            if config.patience and since >= config.patience:
                console.print(f"stopped at step {step}: dev-A was best at step {best_step}")
                break
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == first:
                plan = plan_of(epoch)
            batch, labels, weights = take(task.encoded, task.labels, plan[position])
            numbers = np.maximum(plan[position].rows, 0).astype(np.int32)
            teacher = None if task.teacher is None else task.teacher[numbers]
            state, metrics = run_step(state, Rows(batch, labels, weights, numbers, teacher))
            done = last = step + 1
            held.append((done, plan[position], metrics))
            evaluated = done in evals
            stop = terminated.at(done)
            saved = evaluated or done % config.checkpoint_steps == 0
            logged = saved or done % LOG_STEPS == 0
            if logged or stop:
                check_finite(held, workdir)  # nothing is saved that has diverged
                held.clear()
            if logged:
                line = log.write(done, "train", metrics)
                bar.update(shown, description=f"training, loss {line['loss']:.3f}")
            bar.update(shown, completed=done)
            if evaluated:
                scores = evaluate(state.kept)
                log.write(done, "dev_a", scores)
                if scores[METRIC] >= best_score:
                    best_score, best_step = scores[METRIC], done
                show(done, scores)
            else:
                scores = None
            if saved or stop:
                log.sync()  # a run that resumes here finds the lines so far
                checkpoints.save(done, state, scores)
            if stop and done < total:
                raise Stopped(f"stopped by SIGTERM, all saved: the same command resumes at {done}.")
        best, state = checkpoints.restore_best(state)
        return jax.device_get(state.kept), best, first, last


def check_ids(model: str, tokenizer: Tokenizer, encoded: Encoded, cfg: BertConfig) -> None:
    """An id or type beyond its embedding table would give NaN, silently."""
    for what, largest, size in (
        ("vocabulary", tokenizer.vocab_size - 1, cfg.vocab_size),
        ("token types", int(encoded.types.max(initial=0)), cfg.type_vocab_size),
    ):
        if largest >= size:
            raise ValueError(
                f"{model}: {what} of the tokenizer go up to {largest}, the model embeds {size}: "
                f"tokenizer and data must fit the model."
            )


def short_path(path: str) -> str:
    """A path without the folders above, which are nobody else's business."""
    known = path and (storage.is_remote(path) or Path(path).exists())
    return "/".join(Path(path).parts[-2:]) if known else path


def public(config: TrainConfig) -> TrainConfig:
    """The config as it travels in a bundle."""
    names = ("path", "train", "dev", "test", "unlabelled")
    paths: dict[str, Any] = {name: short_path(getattr(config.data, name)) for name in names}
    data = dataclasses.replace(config.data, cache_dir="", **paths)
    models: dict[str, Any] = {n: short_path(getattr(config, n)) for n in ("model", "teacher")}
    return dataclasses.replace(config, data=data, **models)


def command() -> str:
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    name = f"python -m {program.parent.name}" if module else program.name
    return " ".join([name, *sys.argv[1:]])


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
