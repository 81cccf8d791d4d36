"""Whether this device computes what the CPU computes.

Axes: E exits.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejax.config import BertConfig, ExitConfig
from ejax.inference.engine import early_exit
from ejax.inference.policy import select_exit
from ejax.models.bert import Batch, BertModel
from ejax.models.early_exit import EarlyExitBert
from ejax.training.losses import joint_loss
from train.accelerator.common import LIMIT, Found, Sizes, random_batch, random_variables


def parity(given: Sizes) -> Found:
    """Hidden states, decisions and gradients on this device and on the CPU, by the same program.

    The CPU is a backend of the same process: so every number is compared, at any size, with
    nothing stored that could be of older code. What the CPU computes is held to stored hidden
    states of Hugging Face and to a plain numpy reference by the tests of this repository.
    """
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    cfg = dataclasses.replace(given.parity, dtype="float32")
    exits = ExitConfig((0, 1, cfg.num_hidden_layers), 3, buckets=1 << 10)
    variables = random_variables(EarlyExitBert(cfg, exits), 0.1)
    batch = random_batch(cfg, 40, 29, ragged=True)
    golden = computed(cfg, exits, variables, batch, cpu)
    failed, errors = [], {}
    for dtype in ("float32", "bfloat16"):
        of_type = dataclasses.replace(cfg, dtype=dtype)
        ours = distances(golden, computed(of_type, exits, variables, batch, device))
        # float32: the promises of the library for hidden states and scores. A gradient is a sum
        # over rows and tokens; TF32, which must not be used, has an error of 5e-4.
        bounds = {"hidden": 1e-4, "score": 1e-5, "gradient": 1e-4}
        if dtype == "bfloat16":
            theirs = distances(golden, computed(of_type, exits, variables, batch, cpu))
            bounds = {name: LIMIT * error for name, error in theirs.items()}
        errors[dtype] = {name: {"error": ours[name], "bound": bounds[name]} for name in ours}
        failed += [f"{name} in {dtype}" for name in ours if not ours[name] <= bounds[name]]
        wrong = wrong_exits(golden, bounds["score"], of_type, exits, variables, batch)
        errors[dtype]["exits"] = {"rows": len(batch.ids), "wrong": wrong}
        failed += [f"exits in {dtype}"] if wrong else []
        yield {"errors": errors}
    if failed:
        yield {"error": f"further from the CPU than the bound: {', '.join(failed)}"}
    worst = errors["float32"]["score"]["error"]
    yield {"summary": f"scores at most {worst:.1e} from the CPU in float32"}


def computed(cfg: BertConfig, exits: ExitConfig, variables: Any, batch: Batch, device: Any) -> Any:
    """Numpy: hidden states of real tokens, the logits and scores of all exits, gradients."""
    params, batch = jax.device_put((variables["params"], batch), device)
    return jax.tree.map(np.asarray, outputs(cfg, exits, params, batch))


@partial(jax.jit, static_argnums=(0, 1))
def outputs(cfg: BertConfig, exits: ExitConfig, params: Any, batch: Batch) -> dict[str, Any]:
    model = EarlyExitBert(cfg, exits)

    def loss(params: Any) -> Any:
        logits: Any = model.apply({"params": params}, batch)
        rows = logits.shape[1]
        labels = jnp.arange(rows) % exits.num_labels
        total, count = joint_loss(logits, labels, jnp.ones(rows))
        return total / count, logits

    bert = {"params": params["bert"]}
    hidden: Any = BertModel(cfg).apply(bert, batch, output_hidden_states=True)
    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return {
        "hidden": hidden[1] * batch.mask[None, :, :, None],
        "logits": logits,
        "score": jax.nn.softmax(logits).max(axis=-1),
        "gradient": gradient,
    }


def distances(golden: Any, found: Any) -> dict[str, float]:
    """Largest differences; of gradients, in the norm of each leaf relative to the largest one's."""
    norms = jax.tree.map(np.linalg.norm, golden["gradient"])
    largest = max(jax.tree.leaves(norms))

    def apart(ours: np.ndarray, theirs: np.ndarray, norm: float) -> float:
        return float(np.linalg.norm(ours - theirs) / max(norm, 1e-3 * largest))

    gradients = jax.tree.map(apart, golden["gradient"], found["gradient"], norms)
    return {
        "hidden": float(np.abs(golden["hidden"] - found["hidden"]).max()),
        "score": float(np.abs(golden["score"] - found["score"]).max()),
        "gradient": max(jax.tree.leaves(gradients)),
    }


def wrong_exits(
    golden: Any, bound: float, cfg: BertConfig, exits: ExitConfig, variables: Any, batch: Batch
) -> int:
    """Rows that the engine lets leave where no scores within the bound would let them."""
    logits, threshold = golden["logits"], float(np.median(golden["score"]))
    found = early_exit(EarlyExitBert(cfg, exits), variables, batch, threshold, tile=8)
    first, last = (select_exit(logits, threshold + side * bound).exit for side in (-1, 1))
    exit = np.asarray(found.exit)
    return int(((exit < np.asarray(first)) | (exit > np.asarray(last))).sum())
