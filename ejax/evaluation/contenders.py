"""What a user would run instead: the same fine-tuned weights in PyTorch; in others see `engines`.

Rows of a batch are padded to the longest of them; a pool is sorted by length first.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from ejax.bundle import Bundle
from ejax.data.batches import pad
from ejax.data.tokenizer import Encoded, Text
from ejax.hardware import usable_cores
from ejax.models.heads import mix_columns
from ejax.models.ngrams import ragged_logits
from ejax.models.weights import to_hf
from ejax.saving import hf_config

CORES = usable_cores()


class Setting(NamedTuple):
    """What a small sweep chooses for each contender."""

    batch: int  # rows
    threads: int


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of a contender that tokenises in its own way."""

    inputs: Sequence[Text]

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, rows: np.ndarray) -> "Texts":
        return Texts([self.inputs[row] for row in rows])


Run = Callable[[Any, Setting], np.ndarray]  # Encoded, or Texts -> logits float32 [N, C]


def restart_peak() -> int | None:
    """Resident bytes now, from which the peak is counted again; None where nobody counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def peak_since(before: int | None) -> int | None:
    """How far above `before` resident memory has been since `restart_peak`."""
    return None if before is None else max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field}")


def batches(encoded: Encoded, size: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Row numbers and their `Batch`, the shortest rows first, padded to the longest of each."""
    lengths = encoded.lengths
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, pad(encoded, rows, int(lengths[rows].max()))


def run_batches(
    forward: Callable[[Any], np.ndarray], encoded: Encoded, size: int, bundle: Bundle
) -> np.ndarray:
    """The last exit's logits: what `forward` gives, and what exit 0 adds on the host."""
    logits = from_exit_0(bundle, encoded)[-1]
    for rows, batch in batches(encoded, size):
        logits[rows] += forward(batch)
    return logits


def from_exit_0(bundle: Bundle, encoded: Encoded) -> np.ndarray:
    """What exit 0 adds to the exits after layers, float32 [E, N, C]; zeros without an exit 0."""
    if not bundle.adds_evidence:
        count = len(bundle.exits.encoder.layers)
        return np.zeros((count, len(encoded), bundle.exits.num_labels), np.float32)
    weights = np.asarray(bundle.variables["params"]["ngrams"]["evidence"])
    return weights[:, None, None] * zero_logits(bundle, encoded)


def zero_logits(bundle: Bundle, encoded: Encoded) -> np.ndarray:
    """Those of exit 0 on whole texts, float32 [N, C]."""
    params, whole = bundle.variables["params"]["ngrams"], encoded.whole or encoded
    return ragged_logits(params, whole.ids, whole.types, whole.offsets)


def torch_model(given: Bundle) -> Any:
    """The bundle as a PyTorch module on transformers' BertModel: logits of the last exit.

    `exit_logits(hidden states so far, mask, e)` gives those of any exit.
    """
    import torch
    from transformers import BertConfig, BertModel

    bundle = given.without_zero
    settings = {key: value for key, value in hf_config(bundle).items() if key != "torch_dtype"}
    params = bundle.variables["params"]
    heads = params["heads"]["exits"]
    columns = np.asarray(mix_columns(jnp.asarray(params["heads"]["mix"]), bundle.exits))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(BertConfig(**settings), add_pooling_layer=False)
            d, c = bundle.cfg.hidden_size, bundle.exits.num_labels
            count = len(bundle.exits.layers)
            read = d * bundle.exits.read
            self.dense = torch.nn.ModuleList(torch.nn.Linear(read, d) for _ in range(count))
            self.classifier = torch.nn.ModuleList(torch.nn.Linear(d, c) for _ in range(count))
            self.columns = columns.T.tolist()  # [E, L]

        def second(self, ids: Any, types: Any) -> Any:
            """1 in the second text of a pair."""
            if not bundle.exits.separator:
                return types
            ends = torch.ones_like(ids, dtype=torch.bool)
            for i, token in enumerate(bundle.exits.separator):
                ends &= ids.roll(-i, 1) == token
            return (ends.cumsum(1) > ends).int()

        def pooled(self, x: Any, mask: Any, second: Any) -> Any:
            if bundle.exits.pooling == "cls":
                return x[:, 0]
            pair = bundle.exits.pooling == "pair"
            texts = [mask * (1 - second), mask * second] if pair else [mask]
            real = [text.unsqueeze(-1).to(x.dtype) for text in texts]
            return torch.cat([(x * of).sum(1) / of.sum(1).clamp(min=1) for of in real], 1)

        def exit_logits(self, pooled: list[Any], e: int) -> Any:
            weights = zip(self.columns[e], pooled, strict=False)
            mixed = sum(weight * x for weight, x in weights if weight)
            if bundle.exits.pooling == "pair":
                u, v = mixed.chunk(2, 1)
                mixed = torch.cat([u, v, (u - v).abs(), u * v], 1)
            return self.classifier[e](torch.tanh(self.dense[e](mixed)))

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            found = self.bert(ids, mask, types, output_hidden_states=True)
            second = self.second(ids, types)
            pooled = [self.pooled(x, mask, second) for x in found.hidden_states[1:]]
            return self.exit_logits(pooled, len(self.dense) - 1)

    model = Model()
    encoder = {"embeddings": params["bert"]["embeddings"], "layers": params["bert"]["layers"]}
    tensors = {name: torch.tensor(x) for name, x in to_hf(encoder, bundle.cfg).items()}
    for name in ("dense", "classifier"):
        for e in range(len(bundle.exits.layers)):
            tensors[f"{name}.{e}.weight"] = torch.tensor(np.array(heads[name]["kernel"][e].T))
            tensors[f"{name}.{e}.bias"] = torch.tensor(np.array(heads[name]["bias"][e]))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise RuntimeError(f"the PyTorch module misses {missing} and does not know {unexpected}.")
    return model.eval()


def tensors_of(batch: Any) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(np.asarray(x, np.int64)) for x in batch_arrays(batch))


def batch_arrays(batch: Any) -> tuple[np.ndarray, ...]:
    return batch.ids, batch.mask, batch.types


def torch_full(bundle: Bundle, kind: str) -> Run:
    """Full depth in PyTorch: float32, bfloat16 autocast, or compile: `torch.compile` of the first.

    Compiled for any batch and length.
    """
    import torch

    model = torch_model(bundle)
    if kind == "compile":
        model = torch.compile(model, dynamic=True)

    def forward(batch: Any) -> np.ndarray:
        narrow = torch.autocast("cpu", torch.bfloat16) if kind == "bfloat16" else nullcontext()
        with torch.inference_mode(), narrow:
            return model(*tensors_of(batch)).float().numpy()

    def run(encoded: Encoded, setting: Setting) -> np.ndarray:
        torch.set_num_threads(setting.threads)
        return run_batches(forward, encoded, setting.batch, bundle)

    return run


def torch_early_exit(bundle: Bundle, thresholds: Sequence[float]) -> Run:
    """One text at a time, leaving the layers' loop as soon as an exit is sure.

    Exit 0 runs on the host, before that.
    """
    import torch

    model, first = torch_model(bundle), int(bundle.exits.has_zero)
    temperatures = bundle.temperatures
    exits = {layer: e for e, layer in enumerate(bundle.exits.encoder.layers)}

    def forward(batch: Any, added: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            ids, mask, types = tensors_of(batch)
            x, pooled = model.bert.embeddings(input_ids=ids, token_type_ids=types), []
            second, logits = model.second(ids, types), None
            for number, layer in enumerate(model.bert.encoder.layer, start=1):
                out = layer(x)  # one row: nothing to mask
                x = out[0] if isinstance(out, tuple) else out
                pooled.append(model.pooled(x, mask, second))
                if number in exits:
                    e = exits[number]
                    logits = model.exit_logits(pooled, e) + torch.from_numpy(added[e])
                    score = torch.softmax(logits / temperatures[first + e], -1).max()
                    if score >= thresholds[first + e]:
                        break
            assert logits is not None
            return logits.numpy()

    def run(encoded: Encoded, setting: Setting) -> np.ndarray:
        torch.set_num_threads(setting.threads)
        logits = np.zeros((len(encoded), bundle.exits.num_labels), np.float32)
        added, stay = from_exit_0(bundle, encoded), np.ones(len(encoded), bool)
        if first:
            logits = zero_logits(bundle, encoded)
            stay = softmax(logits / temperatures[0], axis=1).max(axis=1) < thresholds[0]
        for row, batch in batches(encoded, 1):
            if stay[row[0]]:
                logits[row] = forward(batch, added[:, row])
        return logits

    return run
