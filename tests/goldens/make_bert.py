"""Makes the goldens of tests/test_parity.py with Hugging Face's own Flax BERT.

In an environment of its own, `pip install -e ".[parity]"`, run from the repository:

    python tests/goldens/make_bert.py

It writes bert_tiny/ (a random checkpoint under Hugging Face names, 60 kB),
bert_tiny.npz (inputs, and its hidden states for each setting) and minilm.npz (a few
numbers of the hidden states of all-MiniLM-L6-v2, fetched through `ejax.assets`).
The files here were made with transformers 4.57.6, flax 0.12.8, jax 0.10.2 on a CPU.
"""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from ejax import assets

HERE = Path(__file__).parent
TINY = dict(
    vocab_size=101,
    hidden_size=20,
    num_attention_heads=5,
    num_hidden_layers=3,
    intermediate_size=37,
    max_position_embeddings=11,
    type_vocab_size=2,
    model_type="bert",
)
SETTINGS = {"gelu": 1e-12, "gelu_new": 1e-5, "relu": 0.1}  # hidden_act: layer_norm_eps
TEXTS = [  # token ids: a short text, and a pair, [CLS] … [SEP] … [SEP]
    [101, 1037, 12128, 27672, 4774, 102],
    [101, 2129, 2079, 3633, 3524, 1029, 102, 2027, 2562, 1037, 2338, 1012, 102],
]


def random_checkpoint(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Large, uneven weights: every bias, scale and curve of the activation matters."""
    d, f = TINY["hidden_size"], TINY["intermediate_size"]
    tensors = {}

    def tensor(name: str, shape: tuple[int, ...], spread: float, middle: float = 0.0) -> None:
        tensors[name] = (middle + spread * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, out: int, inner: int) -> None:
        tensor(f"{name}.weight", (out, inner), 0.3)
        tensor(f"{name}.bias", (out,), 0.2)

    def norm(name: str) -> None:
        tensor(f"{name}.weight", (d,), 0.3, 1.0)
        tensor(f"{name}.bias", (d,), 0.2)

    rows = ("vocab_size", "max_position_embeddings", "type_vocab_size")
    for name, size in zip(("word", "position", "token_type"), rows, strict=True):
        tensor(f"bert.embeddings.{name}_embeddings.weight", (TINY[size], d), 0.5)
    norm("bert.embeddings.LayerNorm")
    for i in range(TINY["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", d, d)
        linear(f"{layer}.attention.output.dense", d, d)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", f, d)
        linear(f"{layer}.output.dense", d, f)
        norm(f"{layer}.output.LayerNorm")
    linear("bert.pooler.dense", d, d)
    return tensors


def hidden_states(folder, ids, mask, types, **settings) -> np.ndarray:
    """float32 [L + 1, B, T, D], the embeddings first."""
    from transformers import BertConfig, FlaxBertModel  # in the extra `parity` alone

    config = BertConfig.from_pretrained(folder, **settings)
    model = FlaxBertModel.from_pretrained(folder, config=config)
    with jax.default_matmul_precision("highest"):
        out = model(ids, mask, types, output_hidden_states=True)
    return np.stack([np.asarray(x, np.float32) for x in out.hidden_states])


def main() -> None:
    rng = np.random.default_rng(7)
    folder = HERE / "bert_tiny"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY, indent=1) + "\n")
    save_file(random_checkpoint(rng), folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)

    ids = rng.integers(1, TINY["vocab_size"], (2, 7)).astype(np.int32)
    mask = np.asarray([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    types = np.asarray([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]], np.int32)
    hidden = {
        act: hidden_states(folder, ids, mask, types, hidden_act=act, layer_norm_eps=eps)
        for act, eps in SETTINGS.items()
    }
    eps = np.asarray(list(SETTINGS.values()))
    np.savez(HERE / "bert_tiny.npz", ids=ids, mask=mask, types=types, eps=eps, **hidden)

    length = max(map(len, TEXTS))
    ids = np.asarray([text + [0] * (length - len(text)) for text in TEXTS], np.int32)
    mask = (ids > 0).astype(np.int32)
    types = np.zeros_like(ids)
    types[1, 7:] = 1
    minilm = hidden_states(assets.resolve("all-MiniLM-L6-v2"), ids, mask, types)
    tokens = np.asarray([0, 2, 5], np.int32)
    few = minilm[:, :, tokens, :4]
    np.savez(HERE / "minilm.npz", ids=ids, mask=mask, types=types, tokens=tokens, hidden=few)


if __name__ == "__main__":
    main()
