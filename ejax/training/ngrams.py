"""Exit 0 is trained on its own, before the encoder: a convex problem, or nearly so, solved once.

Axes: N rows, V n-grams that are kept, R rank, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from scipy.optimize import minimize
from scipy.sparse import csr_array, diags_array, issparse
from scipy.special import expit, log_softmax

from ejax.config import ExitConfig, TrainConfig
from ejax.data.rows import TokenizedSplit
from ejax.data.tokenizer import Encoded
from ejax.models.ngrams import TINY, exits_after, packed_table, ragged_grams, unpacked_table
from ejax.training.processes import made_by_first

FEWEST_ROWS = 3  # of train that hold an n-gram: a table must not remember single texts
PENALTY = 0.2  # of squared weights, over N: C = 5 of scikit-learn's logistic regression
MOST_STEPS = 300


def trained_zero(
    train: TokenizedSplit, exits: ExitConfig, config: TrainConfig, workdir: Any, console: Console
) -> dict[str, np.ndarray]:
    """Exit 0's parameters, {} where there is none; trained once, see `made_by_first`."""
    if not exits.has_zero:
        return {}

    def fitted() -> dict[str, np.ndarray]:
        rows = train.teaching()
        assert rows.encoded.whole is not None
        params = fit_ngrams(
            rows.encoded.whole, targets_of(rows, exits, config), exits,
            class_weights=config.weights_of_classes, seed=config.seed,
        )  # fmt: skip
        return packed_table(params)

    with console.status("exit 0, on n-grams"):
        saved = made_by_first(workdir / "ngrams.safetensors", fitted)
    return unpacked_table(saved, exits)


def targets_of(rows: TokenizedSplit, exits: ExitConfig, config: TrainConfig) -> np.ndarray:
    """[N, C], see `fit_ngrams`."""
    if exits.problem_type == "multi_label_classification":
        return rows.labels.astype(np.float64)
    return rows.targets(exits.num_labels, config.distillation)


def fit_ngrams(
    encoded: Encoded,
    targets: np.ndarray,
    exits: ExitConfig,
    *,
    class_weights: Sequence[float] = (),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The parameters of `ejax.models.ngrams.NGramExit`, trained to convergence by L-BFGS.

    But for `evidence`, which stays 0: `ejax.calibration.evidence` fits it, on other rows.

    The mean cross-entropy of the targets plus a penalty on squared weights. N-grams in fewer than
    `FEWEST_ROWS` of the rows are left out. With R = C the problem is convex; with a low rank
    the penalty on both factors is one on the nuclear norm of their product (Srebro, Rennie,
    Jaakkola, "Maximum-Margin Matrix Factorization", NIPS 2004).

    Args:
      encoded: train, whole texts.
      targets: float [N, C], how much each class weighs in the row's cross-entropy; a label
        alone is 1 for its class. Of several labels at once 1 for each of them.
      class_weights: one per class; () means 1 each.
      seed: of the first table, where the rank is low.
    """
    n, r, c = len(encoded), exits.rank, exits.num_labels
    grams = ragged_grams(encoded.ids, encoded.types, encoded.offsets, exits.buckets)
    counts: Any = csr_array(grams)
    counts.sum_duplicates()
    rows_with = np.bincount(counts.indices, minlength=exits.buckets)
    known = np.flatnonzero(rows_with >= FEWEST_ROWS)
    weight = np.log(n / rows_with[known])  # 0 for what every row holds
    known, weight = known[weight > 0], weight[weight > 0]
    counts = counts.tocsc()[:, known].tocsr().astype(np.float64)
    norm = np.sqrt(np.maximum(counts @ weight**2, TINY))
    x = diags_array(1 / norm) @ counts @ diags_array(weight)  # [N, V]
    several = exits.problem_type == "multi_label_classification"
    solution = fit_linear(
        x, targets * np.asarray(class_weights or np.ones(c)), PENALTY,
        rank=r, seed=seed, several=several,
    )  # fmt: skip
    table = np.zeros((exits.buckets, r + 1), np.float32)
    table[known, :-1] = solution["table"] * weight[:, None]
    table[known, -1] = weight**2
    kept = {name: solution[name].astype(np.float32) for name in ("bias", "kernel")[: 1 + (r != c)]}
    return {"table": table, "evidence": np.zeros(exits_after(exits), np.float32)} | kept


def fit_linear(
    x: Any,
    targets: np.ndarray,
    penalty: float,
    *,
    rank: int,
    several: bool,
    seed: int = 0,
    start: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A linear classifier by L-BFGS: mean cross-entropy and `penalty` / 2N of squared weights.

    Args:
      x: [N, V], sparse or not.
      targets: [N, C], see `fit_ngrams`, times the weights of the classes.
      rank: R; C makes the problem convex.
      several: whether each label is a logistic regression of its own.
      start: what an earlier call gave; nothing means zeros.

    Returns:
      `table` [V, R], `kernel` [R, C] where R is not C, and `bias` [C], float64.
    """
    (n, v), c, r = x.shape, targets.shape[1], rank
    turned = x.T.tocsr() if issparse(x) else x.T
    shapes = {"table": (v, r), "bias": (c,)} | ({"kernel": (r, c)} if r != c else {})
    rng = np.random.default_rng(seed)
    first = {name: np.zeros(shape) for name, shape in shapes.items()}
    if r != c:  # at zero both factors would stay there
        first |= {name: rng.normal(0, 0.1, shapes[name]) for name in ("table", "kernel")}
    first |= start or {}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    targets = targets / (n if several else targets.sum())
    each = targets.sum(axis=1, keepdims=True)
    penalty = penalty / n

    def parts(flat: np.ndarray) -> dict[str, np.ndarray]:
        pieces = np.split(flat, ends[:-1])
        return {k: p.reshape(s) for (k, s), p in zip(shapes.items(), pieces, strict=True)}

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        p = parts(flat)
        vectors = x @ p["table"].astype(x.dtype, copy=False)
        logits = (vectors @ p["kernel"] if r != c else vectors) + p["bias"]
        if several:  # each label by itself
            loss = np.logaddexp(0, logits).sum() / n - (targets * logits).sum()
            off = expit(logits) / n - targets
        else:
            log_probs = log_softmax(logits, axis=1)
            loss = -(targets * log_probs).sum()
            off = each * np.exp(log_probs) - targets
        back = (off @ p["kernel"].T if r != c else off).astype(x.dtype, copy=False)
        grad = {"table": turned @ back, "bias": off.sum(axis=0)}
        if r != c:
            grad["kernel"] = vectors.T @ off
        for name in shapes:
            if name != "bias":
                loss += penalty / 2 * (p[name] ** 2).sum()
                grad[name] = grad[name] + penalty * p[name]
        return float(loss), np.concatenate([grad[name].ravel() for name in shapes])

    begin = np.concatenate([first[name].ravel() for name in shapes])
    found = minimize(
        objective, begin, jac=True, method="L-BFGS-B",
        options={"maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "ftol": 1e-7, "maxcor": 5},
    )  # fmt: skip
    return parts(found.x)
