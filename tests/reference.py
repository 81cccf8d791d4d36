"""BERT and its exit heads in plain numpy, float64, written from the papers.

No code is shared with the library: only the names in the parameter tree.

Axes: B batch, T tokens, D width, H heads, K head size, F feed-forward, L layers,
E exits, C classes, N rows.
"""

import math

import numpy as np

from ejax.config import BertConfig, ExitConfig


def f64(tree):
    """Every leaf as float64."""
    if isinstance(tree, dict):
        return {name: f64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def at(tree, i):
    """Entry i of every leaf."""
    if isinstance(tree, dict):
        return {name: at(leaf, i) for name, leaf in tree.items()}
    return tree[i]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
}


def norm(p, x, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def encoder_layer(p, cfg, x, mask):
    """[B, T, D] through one layer; the heads one at a time."""
    b, t, d = x.shape
    context = np.zeros((b, t, d))
    size = d // cfg.num_attention_heads
    for h in range(cfg.num_attention_heads):
        q, k, v = (
            x @ p[name]["kernel"][:, h] + p[name]["bias"][h] for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(size)
        scores = np.where(mask[:, None, :] > 0, scores, np.finfo(np.float32).min)
        context[:, :, h * size : (h + 1) * size] = softmax(scores) @ v
    out = p["attention_output"]
    out = context @ out["kernel"].reshape(d, d) + out["bias"]
    x = norm(p["attention_norm"], x + out, cfg.layer_norm_eps)
    hidden = x @ p["intermediate"]["kernel"] + p["intermediate"]["bias"]
    hidden = ACTIVATIONS[cfg.hidden_act](hidden)
    out = hidden @ p["output"]["kernel"] + p["output"]["bias"]
    return norm(p["output_norm"], x + out, cfg.layer_norm_eps)


def hidden_states(bert, cfg: BertConfig, ids, mask, types):
    """[L + 1, B, T, D]: the embeddings, then every layer's output."""
    bert = f64(bert)
    e = bert["embeddings"]
    x = e["word"]["embedding"][ids] + e["token_type"]["embedding"][types]
    x = x + e["position"]["embedding"][: ids.shape[1]]
    seen = [norm(e["norm"], x, cfg.layer_norm_eps)]
    for i in range(cfg.num_hidden_layers):
        seen.append(encoder_layer(at(bert["layers"], i), cfg, seen[-1], mask))
    return np.stack(seen)


def second_text(ids, types, separator):
    """1 in the second text of a pair: after the first separator, or where types say so."""
    if not separator:
        return types
    found, size = np.zeros_like(ids), len(separator)
    for row, kinds in zip(ids.tolist(), found, strict=True):
        starts = [i for i in range(len(row)) if tuple(row[i : i + size]) == separator]
        if starts:
            kinds[starts[0] + 1 :] = 1
    return found


def pooled(x, mask, types, pooling):
    """[B, D], of pairs [B, 2 D]: row by row, over real tokens only, 0 where there are none."""
    if pooling == "cls":
        return x[:, 0]
    texts = [mask > 0] if pooling == "mean" else [(mask > 0) & (types == t) for t in (0, 1)]
    return np.concatenate(
        [
            np.stack([row[t].sum(axis=0) / max(t.sum(), 1) for row, t in zip(x, text, strict=True)])
            for text in texts
        ],
        axis=1,
    )


def read_by_head(mixed, pooling):
    if pooling != "pair":
        return mixed
    u, v = np.split(mixed, 2, axis=1)
    return np.concatenate([u, v, abs(u - v), u * v], axis=1)


def exit_logits(heads, exits: ExitConfig, hidden, mask, types):
    """[E, B, C] from the hidden states [L + 1, B, T, D]."""
    heads = f64(heads)
    logits = []
    for e, layer in enumerate(exits.layers):
        weights = softmax(heads["mix"][e, :layer])
        if exits.mix == "last":
            weights = np.eye(layer)[-1]
        mixed = sum(
            w * pooled(x, mask, types, exits.pooling)
            for w, x in zip(weights, hidden[1 : layer + 1], strict=True)
        )
        p = at(heads["exits"], e)
        x = read_by_head(mixed, exits.pooling)
        x = np.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"])
        logits.append(x @ p["classifier"]["kernel"] + p["classifier"]["bias"])
    return np.stack(logits)


def model_logits(variables, cfg: BertConfig, exits: ExitConfig, ids, mask, types):
    """[E, B, C]: what `EarlyExitBert(cfg, exits).apply` should give."""
    params = variables["params"]
    hidden = hidden_states(params["bert"], cfg, ids, mask, types)
    logits = exit_logits(
        params["heads"], exits.encoder, hidden, mask, second_text(ids, types, exits.separator)
    )
    if not exits.has_zero:
        return logits
    zero = zero_logits(params["ngrams"], exits, ids, mask, types)[None]
    return np.concatenate([zero, logits + f64(params["ngrams"]["evidence"])[:, None, None] * zero])


def gram_buckets(ids, types, buckets):
    """Of one row's real tokens, in Python's own whole numbers: every token and every pair."""
    token = [i * 0x9E3779B1 + t * 0x85EBCA6B for i, t in zip(ids, types, strict=True)]
    pairs = [
        token[i] + ids[i + 1] * 0xC2B2AE35 + 0x27D4EB2F
        for i in range(len(ids) - 1)
        if types[i] == types[i + 1]
    ]
    return [number % buckets for number in (*token, *pairs)]


def zero_logits(p, exits, ids, mask, types):
    """Exit 0's [B, C], row by row."""
    p, logits = f64(p), []
    for row, real, kinds in zip(ids, mask, types, strict=True):
        n = int(real.sum())
        grams = gram_buckets(row[:n].tolist(), kinds[:n].tolist(), exits.buckets)
        total = p["table"][grams].sum(axis=0)
        vector = total[:-1] / math.sqrt(total[-1])
        logits.append(vector @ p.get("kernel", np.eye(exits.num_labels)) + p["bias"])
    return np.stack(logits)


def first_sure(logits, thresholds, temperatures):
    """Exit, score and logits per row, one row and one exit at a time.

    Args: logits [E, N, C]; thresholds [N, E]; temperatures [E].
    """
    exits, rows, _ = logits.shape
    answers = []
    for n in range(rows):
        for e in range(exits):
            score = softmax(np.asarray(logits[e, n], np.float64) / temperatures[e]).max()
            if score >= thresholds[n][e] or e == exits - 1:
                answers.append((e, score, logits[e, n]))
                break
    return tuple(np.asarray(column) for column in zip(*answers, strict=True))


def random_variables(model_cfg: BertConfig, exits: ExitConfig, seed, scale=0.25):
    """Variables of `EarlyExitBert(model_cfg, exits)`, every leaf random, float32.

    Kernels are normal with `scale`, wide enough at these widths that attention is far from
    uniform and scores differ between rows and exits; biases and the mix are not 0 and norms
    are not 1, so that forgetting one shows.
    """
    rng = np.random.default_rng(seed)
    d, h, f = model_cfg.hidden_size, model_cfg.num_attention_heads, model_cfg.intermediate_size
    k, e, n = d // h, len(exits.encoder.layers), exits.layers[-1]
    c = 2 if exits.problem_type == "regression" else exits.num_labels

    def normal(*shape, std=scale, mean=0.0):
        return (mean + std * rng.normal(size=shape)).astype(np.float32)

    def dense(kernel, bias):
        return {"kernel": normal(*kernel), "bias": normal(*bias, std=0.1)}

    def scale_and_bias(*shape):
        return {"scale": normal(*shape, mean=1.0, std=0.1), "bias": normal(*shape, std=0.1)}

    bert = {
        "embeddings": {
            "word": {"embedding": normal(model_cfg.vocab_size, d, std=1)},
            "position": {"embedding": normal(model_cfg.max_position_embeddings, d, std=0.3)},
            "token_type": {"embedding": normal(model_cfg.type_vocab_size, d, std=0.3)},
            "norm": scale_and_bias(d),
        },
        "layers": {
            **{name: dense((n, d, h, k), (n, h, k)) for name in ("query", "key", "value")},
            "attention_output": dense((n, h, k, d), (n, d)),
            "attention_norm": scale_and_bias(n, d),
            "intermediate": dense((n, d, f), (n, f)),
            "output": dense((n, f, d), (n, d)),
            "output_norm": scale_and_bias(n, d),
        },
    }
    heads = {
        "mix": normal(e, n, std=1),
        "exits": {
            "dense": dense((e, d * exits.read, d), (e, d)),
            "classifier": {"kernel": normal(e, d, c, std=0.7), "bias": normal(e, c, std=0.1)},
        },
    }
    zero = {}
    if exits.has_zero:
        table = normal(exits.buckets, exits.rank + 1)
        table[:, -1] = 0.1 + table[:, -1] ** 2  # of a weight; all known
        zero = {"ngrams": {"table": table, "bias": normal(c, std=0.1)}}
        zero["ngrams"]["evidence"] = np.abs(normal(e, std=1))
        if exits.rank != c:
            zero["ngrams"]["kernel"] = normal(exits.rank, c)
    return {"params": {"bert": bert, "heads": heads, **zero}}


def random_batch(cfg: BertConfig, rows, length, seed):
    """ids, mask and types int32 [rows, length]; ragged lengths, of at least 2 real tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)
    types = rng.integers(0, cfg.type_vocab_size, (rows, length)).astype(np.int32)
    real = rng.integers(2, length + 1, (rows, 1))
    mask = (np.arange(length) < real).astype(np.int32)
    return ids, mask, types
