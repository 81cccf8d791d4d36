"""What a decision means: labels with their probabilities, numbers, or no answer.

Axes: N rows, C classes.
"""

from typing import Any

import numpy as np
from scipy.special import softmax

from ejax.bundle import Bundle
from ejax.calibration import abstain as abstention
from ejax.errors import UserError
from ejax.inference.policy import Decision
from ejax.tasks import Regression, SeveralLabels


def abstain_level(bundle: Bundle, abstain: float | None) -> np.float32:
    level = abstention.check_abstain(bundle.abstain if abstain is None else abstain)
    if level and bundle.task.metric != "accuracy":
        raise UserError("abstain is for bundles of one label per text.")
    return level


def certainty(bundle: Bundle, decision: Decision) -> np.ndarray:
    """What `abstain` is compared with, float32 [N]."""
    return abstention.certainty(decision.logits, bundle.calibration[decision.exit])


def answers(
    bundle: Bundle, decision: Decision, top_k: int | None, abstain: float | np.float32 = 0.0
) -> list[Any]:
    """A decision in the words of `EarlyExitClassifier.__call__`."""
    layers = np.asarray(bundle.exits.layers)[decision.exit].tolist()
    task, labels = bundle.task, bundle.labels
    if isinstance(task, Regression):
        numbers = chosen(bundle, decision).tolist()
        scores = [
            {"label": labels[0], "score": score, "exit_layer": layer}
            for score, layer in zip(numbers, layers, strict=True)
        ]
        return scores if top_k == 1 else [[score] for score in scores]
    probs = probabilities(bundle, decision)
    order = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
    scores = np.take_along_axis(probs, order, axis=1).tolist()
    found = [
        [
            {"label": labels[i], "score": score, "exit_layer": layer}
            for i, score in zip(*row, strict=True)
        ]
        for *row, layer in zip(order.tolist(), scores, layers, strict=True)
    ]
    if isinstance(task, SeveralLabels):
        for of_row, sure, row in zip(found, chosen(bundle, decision), order, strict=True):
            for answer, on in zip(of_row, sure[row].tolist(), strict=True):
                answer["chosen"] = on
    for row in np.flatnonzero(certainty(bundle, decision) < abstain) if abstain else ():
        found[row].insert(0, found[row][0] | {"label": None})
    return [likeliest[0] for likeliest in found] if top_k == 1 else found


def plain(bundle: Bundle, decision: Decision) -> list[Any]:
    """The answers alone: a label per text; a list of labels, maybe none; or a number."""
    found, labels = chosen(bundle, decision), bundle.labels
    if isinstance(bundle.task, Regression):
        return found.tolist()
    if found.ndim == 2:
        return [[labels[i] for i in np.flatnonzero(of_row)] for of_row in found]
    return [labels[i] for i in found]


def chosen(bundle: Bundle, decision: Decision) -> np.ndarray:
    """The answers in numbers: int [N]; bool [N, C] of several labels; float [N] of a score."""
    return bundle.task.answers(decision.logits, bundle.calibration[decision.exit])


def probabilities(bundle: Bundle, decision: Decision) -> np.ndarray:
    """softmax(logits / temperature of the exit taken), float32 [N, C]; or sigmoid."""
    task, temperature = bundle.task, bundle.calibration[decision.exit]
    if isinstance(task, SeveralLabels):
        return task.probabilities(decision.logits, temperature)
    if isinstance(task, Regression):
        raise UserError("a regression has no probabilities: predict gives its scores.")
    return np.asarray(softmax(decision.logits / temperature[:, None], axis=1))
