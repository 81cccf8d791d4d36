"""Train BERT with exits in a loop of your own: Flax modules, Optax, and early exit at the end.

    python examples/flax_training_loop.py ROWS.csv all-MiniLM-L6-v2 3

ROWS.csv has the columns `label` and `text`; every fifth row is for testing. 3: epochs.
"""

import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ejax
from ejax.assets import resolve
from ejax.data.batches import pad
from ejax.data.tokenizer import load_tokenizer

file, name, epochs = sys.argv[1:]
with open(file, encoding="utf-8", newline="") as lines:
    rows = list(csv.DictReader(lines))
names, labels = np.unique([row["label"] for row in rows], return_inverse=True)
tokens = load_tokenizer(resolve(name)).encode([row["text"] for row in rows], max_length=32)
test = np.arange(len(rows)) % 5 == 4
cfg, bert = ejax.load_bert(name, dtype="float32")
exits = ejax.ExitConfig(layers=(1, cfg.num_hidden_layers), num_labels=len(names))
model = ejax.EarlyExitBert(cfg, exits)
variables = jax.jit(model.init)(jax.random.key(0), pad(tokens, np.arange(1), 32))
params = ejax.with_pretrained(variables, bert)["params"]
rates = {"bert": optax.adamw(5e-5), "heads": optax.adamw(2e-3)}  # heads start from nothing
optimizer = optax.partition(rates, {part: part for part in rates})


@jax.jit
def step(params, state, batch, labels, key):
    def loss_of(params):
        keys = jax.random.split(key, len(labels))  # of dropout, one per row
        logits = model.apply({"params": params}, batch, keys=keys)  # [E, B, C]
        every = jnp.broadcast_to(labels, logits.shape[:2])
        return optax.softmax_cross_entropy_with_integer_labels(logits, every).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state, root = optimizer.init(params), jax.random.key(1)
for epoch in range(int(epochs)):
    order = np.random.default_rng(epoch).permutation(np.flatnonzero(~test))
    for batch in order[: len(order) // 16 * 16].reshape(-1, 16):
        root, key = jax.random.split(root)
        params, state, loss = step(params, state, pad(tokens, batch, 32), labels[batch], key)
    print(f"epoch {epoch + 1}: loss {float(loss):.3f}")

out = ejax.early_exit(model, {"params": params}, pad(tokens, np.flatnonzero(test), 32), 0.9)
print(f"accuracy {(out.logits.argmax(axis=1) == labels[test]).mean():.3f}")
print(f"exit after layer 1: {(out.exit == 0).mean():.0%} of the test rows")
