"""What rows cost: floating-point operations from shapes alone, seconds from a profile.

Operations: a product of [m, k] and [k, n] counts 2 m k n; norms, activations and softmax,
some percent of the time of a layer, are left out.

Axes: N rows, B rows of a tile, T tokens, D width, F feed-forward, L layers, E exits, C classes.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ejax import storage
from ejax.assets import cache_dir
from ejax.config import BertConfig, ExitConfig
from ejax.errors import UserError
from ejax.hardware import cpu_type, describe
from ejax.inference.schedule import tiles


def layer_flops(cfg: BertConfig, tokens: Any) -> Any:
    """Of one encoder layer for rows of `tokens` tokens (a number or an array): the same shape."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    return 2 * tokens * (4 * d * d + 2 * d * f) + 4 * np.square(tokens) * d


def head_flops(cfg: BertConfig, exits: ExitConfig) -> int:
    """Of one exit head for one row."""
    return 2 * cfg.hidden_size * (exits.read * cfg.hidden_size + exits.num_labels)


def zero_flops(exits: ExitConfig, tokens: Any) -> Any:
    """Of exit 0 for rows of `tokens` tokens: two rows of its table a token, and its linear map."""
    kernel = 2 * exits.rank * exits.num_labels * (exits.rank != exits.num_labels)
    return 2 * 2 * tokens * (exits.rank + 1) + kernel


def zero_in_layers(cfg: BertConfig, exits: ExitConfig, tokens: Any, whole: Any) -> float:
    """What exit 0 costs in encoder layers; 0 where there is none.

    Args:
      tokens, whole: int [N], those that the encoder reads and those that exit 0 reads.
    """
    if not exits.has_zero:
        return 0.0
    return float(zero_flops(exits, whole).sum() / layer_flops(cfg, tokens).sum())


def exit_flops(cfg: BertConfig, exits: ExitConfig, tokens: Any, whole: Any = None) -> np.ndarray:
    """Of rows that leave at each exit, all heads on their way counted: float64 [E, N].

    Args:
      tokens: int [N], real tokens per row.
      whole: int [N], those that exit 0 reads, where there are more.
    """
    after = np.asarray(exits.encoder.layers)
    heads = np.arange(1, len(after) + 1)
    per_layer = layer_flops(cfg, np.asarray(tokens, np.float64))
    flops = after[:, None] * per_layer + heads[:, None] * head_flops(cfg, exits)
    if not exits.has_zero:
        return flops
    zero = zero_flops(exits, np.asarray(tokens if whole is None else whole, np.float64))
    return np.concatenate([zero[None], zero + flops])


def ideal_speedup(
    cfg: BertConfig, exits: ExitConfig, tokens: Any, exit: Any, whole: Any = None
) -> float:
    """Operations of full depth, the last head alone, over those of rows that leave so.

    Args:
      tokens: int [N].
      exit: int [N], index into `exits.layers`.
      whole: see `exit_flops`.
    """
    flops = exit_flops(cfg, exits, tokens, whole)
    spent = flops[np.asarray(exit), np.arange(flops.shape[1])].sum()
    return float(full_flops(cfg, exits, tokens).sum() / spent)


def full_flops(cfg: BertConfig, exits: ExitConfig, tokens: Any) -> np.ndarray:
    """Of rows at full depth with the last head alone: float64 [N]."""
    layers = layer_flops(cfg, np.asarray(tokens, np.float64))
    return exits.num_layers * layers + head_flops(cfg, exits)


def tile_rows(exit: Any, tile: int, exits: int) -> np.ndarray:
    """Rows that the engine runs in each segment, those of padding in its tiles counted: int [E].

    Args:
      exit: int [N], where the rows of one pool leave.
    """
    alive = (np.asarray(exit)[None] >= np.arange(exits)[:, None]).sum(axis=1)
    return np.array([sum(size * count for size, count in tiles(n, tile)) for n in alive.tolist()])


class Seconds(NamedTuple):
    """What the parts of one tile take."""

    layer: float  # one encoder layer
    head: float  # pooling, mix and head of one exit
    gather: float  # the rest of a step: rows read and written, scores, order


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds per tile [B, T] on one kind of machine, for encoders of one shape."""

    machine: str
    date: str
    dtype: str  # the fastest for tiles; of a graph such as "onnx-int8"
    single_dtype: str  # and for one row alone
    tile: dict[int, int]  # T -> the fastest B
    seconds: dict[tuple[int, int], Seconds]  # (B, T)
    whole: float = 1.0  # what the engine takes over the sum of these parts, each timed alone
    zero: float = 0.0  # seconds per token of exit 0

    def beside(self, older: "Profile | None") -> "Profile":
        """With the lengths that were measured before, in the same types, and not again."""
        types = (self.dtype, self.single_dtype)
        if older is None or (older.dtype, older.single_dtype) != types:
            return self
        others = {shape: s for shape, s in older.seconds.items() if shape[1] not in self.tile}
        return dataclasses.replace(self, tile=older.tile | self.tile, seconds=others | self.seconds)

    def predict(self, exits: ExitConfig, exit: Any, tile: int, length: int) -> float:
        """Seconds of one pool of `length` tokens whose rows leave at `exit`, int [N].

        Raises:
          ValueError: when these tiles were not measured.
        """
        layers = np.diff((0, *exits.encoder.layers))
        exit = np.asarray(exit) - exits.has_zero  # what left at exit 0 is in no pool
        alive = (exit[None] >= np.arange(len(layers))[:, None]).sum(axis=1)
        total = 0.0
        for rows, run in zip(alive.tolist(), layers.tolist(), strict=True):
            for size, count in tiles(rows, tile):
                if (size, length) not in self.seconds:
                    raise UserError(
                        f"the profile of this machine holds no tile of {size} rows of {length} "
                        f"tokens: run `ejax profile` again for this bundle."
                    )
                part = self.seconds[size, length]
                total += count * (run * part.layer + part.head + part.gather)
        return self.whole * total


def profile_path(cfg: BertConfig, *runtime: str) -> Path:
    """Where the profile of this kind of machine and shape of encoder is kept.

    Args:
      runtime: what tells apart one that is not JAX.
    """
    if not runtime:
        import jax

        runtime = describe(), jax.__version__
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
    parts = [cpu_type(), *runtime, *(getattr(cfg, name) for name in names)]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return cache_dir() / "profiles" / f"{digest[:16]}.json"


def save_profile(profile: Profile, path: Path) -> None:
    """As JSON, whole or not at all."""
    values = dataclasses.asdict(profile) | {
        "seconds": [
            {"rows": size, "tokens": length, **part._asdict()}
            for (size, length), part in sorted(profile.seconds.items())
        ]
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(path, json.dumps(values, indent=2) + "\n")


def load_profile(path: Path) -> Profile | None:
    """What `save_profile` wrote; None where there is none.

    Raises:
      ValueError: for a damaged file.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        seconds = {
            (row["rows"], row["tokens"]): Seconds(row["layer"], row["head"], row["gather"])
            for row in values.pop("seconds")
        }
        tile = {int(length): rows for length, rows in values.pop("tile").items()}
        return Profile(**values, tile=tile, seconds=seconds)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error!r}. Delete it, or run `ejax profile`."
        ) from None


def profile_for(cfg: BertConfig, asked: str | Path | None, *runtime: str) -> Profile | None:
    """ "auto": the one kept here, if any; else that of a path; None is none.

    Args:
      runtime: see `profile_path`.

    Raises:
      ValueError: for a damaged file, or a path where there is none.
    """
    if asked is None:
        return None
    path = profile_path(cfg, *runtime) if asked == "auto" else Path(asked)
    found = load_profile(path)
    if found is None and asked != "auto":
        raise UserError(f"No such profile: {path}. `ejax profile BUNDLE --output` writes one.")
    return found
