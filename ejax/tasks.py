"""What differs between problem types: outputs, loss, score, answer and metric.

`problem_type` has the names of Hugging Face. Training, the engine, calibration, thresholds and
the classifier ask `task_of(exits)`, and have no rule of their own.

Axes: E exits, N rows, C labels, O outputs of a head, K numbers of calibration per exit.
"""

import dataclasses
import math
from collections.abc import Container
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ejax.config import ExitConfig, Problem

if TYPE_CHECKING:  # a runtime without jax asks tasks too: what computes with it imports it
    from jax import Array
else:
    Array = Any

FAR = 2.0  # deviations, from which on an error counts by its logarithm


@dataclasses.dataclass(frozen=True)
class Task:
    """One of several labels: a softmax, cross-entropy, accuracy.

    Attributes:
      labels: C.
    """

    labels: int
    problem_type: ClassVar[Problem] = "single_label_classification"
    metric: ClassVar[str] = "accuracy"  # in JSON; in [0, 1] or [-1, 1], higher is better
    metric_name: ClassVar[str] = "accuracy"  # for people
    answer_ndim: ClassVar[int] = 1  # axes of the answers to N rows
    # What is told of every exit: names in JSON, and for people.
    measures: ClassVar[dict[str, str]] = {
        "accuracy": "accuracy", "macro_f1": "macro-F1", "nll": "NLL", "brier": "Brier",
        "ece_width": "ECE",
    }  # fmt: skip

    @property
    def outputs(self) -> int:
        """O."""
        return self.labels

    def has_label(self, labels: Any) -> Any:
        """bool [N]; of numpy or JAX."""
        return labels >= 0

    def losses(self, logits: Array, labels: Array) -> Array:
        """Of every row by its label, [E, N]; 0 for a row without one."""
        import jax.numpy as jnp
        import optax  # slow to import

        rows = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(labels[None], logits.shape[:2])
        )
        return jnp.where(self.has_label(labels)[None], rows, 0.0)

    def beliefs(self, logits: Array) -> Array:
        """What an exit teaches the others, [N, ...]."""
        import jax

        return jax.nn.softmax(logits)

    def distances(self, logits: Array, beliefs: Array) -> Array:
        """From beliefs to what each exit says, [E, N]; 0 where they agree."""
        import jax
        import optax

        return optax.losses.kl_divergence(jax.nn.log_softmax(logits), beliefs[None])

    @property
    def uncalibrated(self) -> np.ndarray:
        """Of one exit: float32, () or [K]."""
        return np.array(1, np.float32)

    def score(self, logits: Array, calibration: Array) -> Array:
        """What a threshold is compared with, float32 [...] in [0, 1]: higher is surer.

        Here the largest probability of `logits / temperature` (Schwartz et al., "The Right Tool
        for the Job", ACL 2020, section 3.2).

        Args:
          logits: float32 [..., O].
          calibration: float32 [...] or [..., K].
        """
        import jax.numpy as jnp

        scaled = logits / jnp.broadcast_to(calibration, logits.shape[:-1])[..., None]
        shifted = scaled - scaled.max(axis=-1, keepdims=True)
        return 1.0 / jnp.exp(shifted).sum(axis=-1)

    def answers(self, logits: np.ndarray, calibration: Any) -> np.ndarray:
        """int [...], the label; of several labels bool [..., C]; of a score float [...].

        Args: as of `score`.
        """
        return np.asarray(logits).argmax(axis=-1)

    def right(self, answers: Any, labels: Any) -> Any:
        """bool [...]."""
        return np.asarray(answers == labels)

    def differ(self, answers: Any, others: Any) -> Any:
        """bool [...]: whether two answers to a text differ."""
        return np.asarray(answers != others)

    def row_loss(self, answers: Any, labels: Any) -> Any:
        """[...] in [0, 1]: how wrong an answer is."""
        return 1.0 - self.right(answers, labels)

    def measure(self, answers: Any, labels: Any) -> float:
        """The metric of N answers."""
        return float(np.mean(self.right(answers, labels)))

    def chance(self, labels: Any) -> float:
        """The metric of the best answer that is the same for all N rows."""
        return float(np.bincount(labels).max() / len(labels))

    def standard_error(self, value: float, rows: int) -> float:
        """Of the metric where it is `value` on N rows, nearly: of a share."""
        return math.sqrt(value * (1 - value) / rows)


@dataclasses.dataclass(frozen=True)
class SeveralLabels(Task):
    """Any number of labels per text: a sigmoid and a decision threshold each, micro-F1.

    Calibration [K = 2 C]: temperatures, then decision thresholds, which are probabilities.
    """

    problem_type: ClassVar[Problem] = "multi_label_classification"
    metric: ClassVar[str] = "micro_f1"
    metric_name: ClassVar[str] = "micro-F1"
    answer_ndim: ClassVar[int] = 2
    measures: ClassVar[dict[str, str]] = {
        "micro_f1": "micro-F1", "macro_f1": "macro-F1", "exact": "exact",
    }  # fmt: skip

    def has_label(self, labels: Any) -> Any:
        return labels[..., 0] >= 0

    def losses(self, logits: Array, labels: Array) -> Array:
        import jax.numpy as jnp
        import optax

        given = jnp.maximum(labels, 0.0)
        rows = optax.sigmoid_binary_cross_entropy(logits, jnp.broadcast_to(given, logits.shape))
        return jnp.where(self.has_label(labels)[None], rows.mean(axis=-1), 0.0)

    def beliefs(self, logits: Array) -> Array:
        import jax

        return jax.nn.sigmoid(logits)

    def distances(self, logits: Array, beliefs: Array) -> Array:
        import jax
        import jax.numpy as jnp
        import optax

        own, p = jnp.broadcast_arrays(logits, beliefs[None])
        cross = optax.sigmoid_binary_cross_entropy(own, p)
        entropy = jax.scipy.special.entr(p) + jax.scipy.special.entr(1 - p)
        return (cross - entropy).mean(axis=-1)

    @property
    def uncalibrated(self) -> np.ndarray:
        return np.repeat(np.array([1.0, 0.5], np.float32), self.labels)

    def score(self, logits: Array, calibration: Array) -> Array:
        """How far the least certain label's probability is from its decision threshold.

        As a share of the way to 0 or 1. In the spirit of F-PABEE (Gao et al., ICASSP 2023), which
        compares whole distributions of neighbouring exits.
        """
        import jax
        import jax.numpy as jnp

        whole = jnp.broadcast_to(calibration, (*logits.shape[:-1], 2 * self.labels))
        temperature, decision = jnp.split(whole, 2, axis=-1)
        return _least_way(jax.nn.sigmoid(logits / temperature), decision, jnp)

    def host_score(self, logits: Any, calibration: Any) -> np.ndarray:
        """`score` by numpy, which compiles nothing for a new number of rows."""
        decision = np.split(calibration, 2, axis=-1)[1]
        return np.asarray(_least_way(self.probabilities(logits, calibration), decision, np))

    def probabilities(self, logits: Any, calibration: Any) -> np.ndarray:
        """float32 [..., C]."""
        from scipy.special import expit  # slow to import

        return np.asarray(expit(self.log_odds(logits, calibration)))

    def log_odds(self, logits: Any, calibration: Any) -> np.ndarray:
        """float32 [..., C]."""
        temperature, _ = np.split(calibration, 2, axis=-1)
        return np.asarray(np.asarray(logits, np.float32) / temperature)

    def answers(self, logits: np.ndarray, calibration: Any) -> np.ndarray:
        _, decision = np.split(np.asarray(calibration), 2, axis=-1)
        return np.asarray(self.probabilities(logits, calibration) >= decision)

    def right(self, answers: Any, labels: Any) -> Any:
        return (np.asarray(answers) == (np.asarray(labels) > 0)).all(axis=-1)

    def differ(self, answers: Any, others: Any) -> Any:
        return np.asarray(answers != others).any(axis=-1)

    def row_loss(self, answers: Any, labels: Any) -> Any:
        """1 - F1 of the row's own labels; 0 where there are none and none is answered."""
        answers, true = np.asarray(answers, bool), np.asarray(labels) > 0
        both = (answers & true).sum(axis=-1)
        either = answers.sum(axis=-1) + true.sum(axis=-1)
        return 1.0 - np.where(either, 2 * both / np.maximum(either, 1), 1.0)

    def measure(self, answers: Any, labels: Any) -> float:
        """2 TP / (2 TP + FP + FN) over all labels of all rows; 1 where there are none of them."""
        answers, true = np.asarray(answers, bool), np.asarray(labels) > 0
        return f1(int((answers & true).sum()), int(answers.sum()), int(true.sum()))

    def chance(self, labels: Any) -> float:
        """Of the most frequent labels, as many as do best."""
        counts = np.sort((np.asarray(labels) > 0).sum(axis=0))[::-1]
        of_each = 2 * counts.cumsum() / (counts.sum() + len(labels) * np.arange(1, len(counts) + 1))
        return float(of_each.max()) if counts.any() else 1.0


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """A number per text: its mean and its own error, Spearman's correlation.

    A head gives the mean and the logarithm of a standard deviation. Calibration: one factor per
    exit of that deviation.

    Attributes:
      spread: the standard deviation of the scores in training.
      tolerance: answers this far apart, or less, are the same.
    """

    spread: float = 1.0
    tolerance: float = 0.5
    problem_type: ClassVar[Problem] = "regression"
    metric: ClassVar[str] = "spearman"
    metric_name: ClassVar[str] = "Spearman's correlation"
    measures: ClassVar[dict[str, str]] = {
        "spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE", "mae": "MAE",
    }  # fmt: skip

    @property
    def outputs(self) -> int:
        return 2

    def has_label(self, labels: Any) -> Any:
        return labels == labels  # NaN is not itself

    def losses(self, logits: Array, labels: Array) -> Array:
        """Half the squared error, which trains the mean, and a Gaussian's for the deviation alone.

        Nix and Weigend, "Estimating the mean and variance of the target probability distribution"
        (1994), but the mean does not listen to the deviation, which would let it give up on hard
        rows (Seitzer et al., "On the Pitfalls of Heteroscedastic Uncertainty Estimation", ICLR
        2022, with beta = 1). Errors of more than `FAR` deviations count by their logarithm: the
        deviation's gradient lies between 1 - `FAR`^2 and 1, however sure and wrong an exit is.
        """
        import jax
        import jax.numpy as jnp

        known = self.has_label(labels)
        off = (logits[..., 0] - jnp.where(known, labels, 0.0)[None]) / self.spread
        log_sigma = logits[..., 1] - math.log(self.spread)
        size = jnp.maximum(jnp.abs(jax.lax.stop_gradient(off)), jnp.finfo(jnp.float32).tiny)
        beyond = jnp.log(size) - log_sigma - math.log(FAR)  # above 0: more than FAR deviations
        near = jnp.exp(2 * jnp.minimum(beyond, 0.0))
        rows = off**2 / 2 + log_sigma + FAR**2 / 2 * (near + 2 * jnp.maximum(beyond, 0.0))
        return jnp.where(known[None], rows, 0.0)

    def beliefs(self, logits: Array) -> Array:
        return logits[..., 0]

    def distances(self, logits: Array, beliefs: Array) -> Array:
        return ((logits[..., 0] - beliefs[None]) / self.spread) ** 2 / 2

    def score(self, logits: Array, calibration: Array) -> Array:
        """1 / (1 + deviation / spread): 0.5 for as unsure as one who has not read the text."""
        return 1.0 / (1.0 + self.deviation(logits, calibration) / self.spread)

    def deviation(self, logits: Any, calibration: Any) -> Any:
        """The error an exit expects of itself, in the unit of the scores: float32 [...]."""
        import jax.numpy as jnp

        return jnp.exp(logits[..., 1]) * calibration

    def answers(self, logits: np.ndarray, calibration: Any) -> np.ndarray:
        return np.asarray(logits)[..., 0]

    def right(self, answers: Any, labels: Any) -> Any:
        """Whether the answer is within the tolerance."""
        return ~self.differ(answers, labels)

    def differ(self, answers: Any, others: Any) -> Any:
        return np.abs(np.asarray(answers) - others) > self.tolerance

    def row_loss(self, answers: Any, labels: Any) -> Any:
        """The squared error over four variances of the scores, at most 1."""
        off = (np.asarray(answers) - labels) / (2 * self.spread)
        return np.minimum(off**2, 1.0)

    def measure(self, answers: Any, labels: Any) -> float:
        """Spearman's rank correlation; 0 where one of the two is constant."""
        from scipy.stats import rankdata  # slow to import

        if np.ptp(answers) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(np.corrcoef(rankdata(answers), rankdata(labels))[0, 1])

    def chance(self, labels: Any) -> float:
        return 0.0

    def standard_error(self, value: float, rows: int) -> float:
        """Bonett and Wright, "Sample size requirements for … correlations" (2000), equation 2."""
        return (1 - value**2) * math.sqrt((1 + value**2 / 2) / max(rows - 3, 1))


def f1(hits: float, answered: float, positive: float) -> float:
    """2 TP / (2 TP + FP + FN); 1 where nothing is to be found and nothing is answered."""
    either = answered + positive
    return 2 * hits / either if either else 1.0


def _least_way(p: Any, decision: Any, xp: Any) -> Any:
    """Of probabilities [..., C] from their decision thresholds: [...]."""
    way = xp.where(p >= decision, (p - decision) / (1 - decision), (decision - p) / decision)
    return way.min(axis=-1)


TASKS: dict[str, type[Task]] = {
    task.problem_type: task for task in (Task, SeveralLabels, Regression)
}


def task_with(metrics: Container[str]) -> type[Task]:
    """The task whose metric is among the keys of a result."""
    return next(task for task in TASKS.values() if task.metric in metrics)


def task_of(exits: ExitConfig) -> Task:
    """The task of a model with these exits."""
    if exits.problem_type == "multi_label_classification":
        return SeveralLabels(exits.num_labels)
    if exits.problem_type == "regression":
        return Regression(1, exits.spread, exits.spread / 2)
    return Task(exits.num_labels)
