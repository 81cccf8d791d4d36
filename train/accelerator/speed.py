"""How fast the engine, a step of training and a loop are on this device, and PyTorch on the same.

Axes: N rows, T tokens, E exits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ejax.bundle import Bundle
from ejax.config import BertConfig, ExitConfig, TrainConfig
from ejax.inference.cost import full_flops, ideal_speedup, layer_flops
from ejax.inference.engine import early_exit, full_depth
from ejax.inference.prepared import Prepared, prepare
from ejax.models.early_exit import EarlyExitBert
from ejax.training.optim import make_optimizer
from ejax.training.parallel import mapped_step
from ejax.training.step import Rows, TrainState, first_state, make_train_step
from train.accelerator import common
from train.aot_programs import last_exit_flops

SHARES = (0.4, 0.25, 0.2, 0.15)  # of the rows at each exit: a third of the layers on average


def best_tile(
    given: common.Sizes, bundle: Bundle, weights: Prepared, peak: float
) -> tuple[int, list[dict[str, Any]]]:
    """The rows of a tile whose layer takes least time per row, and what each takes."""
    cfg, length = bundle.cfg, given.length
    runs = {
        rows: common.layer_runs(
            cfg, weights, common.stream(cfg, rows, length), np.ones((rows, length), np.int32)
        )
        for rows in given.tiles
    }
    taken = common.timings(given, runs)
    flops = layer_flops(cfg, length)
    table = [
        {"rows": rows, "layer": {name: value / common.LAYERS for name, value in seconds.items()}}
        | {"share_of_peak": common.LAYERS * rows * flops / seconds["median"] / peak}
        for rows, seconds in taken.items()
    ]
    return min(taken, key=lambda rows: taken[rows]["median"] / rows), table


class Pool:
    """Rows on the device, each told by thresholds where to leave, and the runs of the engine."""

    def __init__(self, bundle: Bundle, weights: Prepared, rows: int, length: int, tile: int):
        self.bundle, self.rows, self.length, self.tile = bundle, rows, length, tile
        count = len(bundle.exits.layers)
        shares = np.array(SHARES[:count]) / sum(SHARES[:count])
        self.exit = np.random.default_rng(2).choice(count, rows, p=shares)
        self.thresholds = np.where(np.arange(count) < self.exit[:, None], 2.0, 0.0)
        self.batch = jax.device_put(common.random_batch(bundle.cfg, rows, length))
        of_engine = partial(early_exit, bundle.model, weights, self.batch, tile=tile)
        self.runs: dict[str, Callable[[], Any]] = {
            "full_depth": partial(full_depth, bundle.model, weights, self.batch, tile=tile),
            "engine_full_depth": partial(of_engine, 2.0),
            "early_exit": partial(of_engine, self.thresholds),
        }

    def check(self) -> None:
        if not np.array_equal(self.runs["early_exit"]().exit, self.exit):
            raise AssertionError("rows left elsewhere than their thresholds say.")

    def facts(self, seconds: Mapping[str, Mapping[str, float]], peak: float) -> dict[str, Any]:
        """Texts per second and shares of the peak, from the seconds of each run."""
        cfg, exits, tokens = self.bundle.cfg, self.bundle.exits, np.full(self.rows, self.length)
        ideal = ideal_speedup(cfg, exits, tokens, self.exit)
        full, early = (seconds[name]["median"] for name in ("full_depth", "early_exit"))
        flops = float(full_flops(cfg, exits, tokens).sum())
        return {
            "rows": self.rows, "tokens_per_row": self.length, "tile": self.tile,
            "layers": list(exits.layers), "seconds": dict(seconds),
            "texts_per_second": {name: self.rows / of["median"] for name, of in seconds.items()},
            "mean_depth": float(np.asarray(exits.layers)[self.exit].mean()),
            "ideal_speedup": ideal, "speedup": full / early, "efficiency": full / early / ideal,
            "full_depth_share_of_peak": flops / full / peak,
            "early_exit_share_of_peak": flops / ideal / early / peak,
        }  # fmt: skip


def engine(
    given: common.Sizes, cfg: BertConfig, layers: tuple[int, ...], rows: int
) -> common.Found:
    """Texts per second at full depth and with early exit, and what of the ideal is reached."""
    peak = common.matmul_flops(given)
    yield {"matmul_flops": peak}
    bundle = common.bundle_of(cfg, layers)
    weights = jax.device_put(prepare(bundle.model, bundle.variables))
    tile, table = best_tile(given, bundle, weights, peak)
    yield {"tiles": table}
    pool = Pool(bundle, weights, rows, given.length, tile)
    pool.check()
    found = pool.facts(common.timings(given, pool.runs), peak)
    yield found
    yield {
        "summary": f"{found['texts_per_second']['early_exit']:,.0f} texts/s, "
        f"{found['speedup']:.2f} times full depth ({found['efficiency']:.2f} of the ideal), which "
        f"runs at {found['full_depth_share_of_peak']:.2f} of the peak"
    }


def engine_base(given: common.Sizes) -> common.Found:
    return engine(given, given.base, given.base_exits, given.rows)


def engine_large(given: common.Sizes) -> common.Found:
    return engine(given, given.large, given.large_exits, given.rows // 2)


def rivals(given: common.Sizes) -> common.Found:
    """Early exit and full depth against the same weights in PyTorch, full depth, one device.

    A standard BERT classifier, without padding: so that PyTorch needs no mask.
    """
    on_cpu = jax.default_backend() == "cpu"
    bundle = common.bundle_of(given.base, given.base_exits, pooling="cls", mix="last")
    peak = common.matmul_flops(given)
    weights = jax.device_put(prepare(bundle.model, bundle.variables))
    tile, _ = best_tile(given, bundle, weights, peak)
    pool = Pool(bundle, weights, given.rows, given.length, tile)
    seconds = common.timings(given, pool.runs)
    yield pool.facts(seconds, peak)
    try:
        import torch

        from ejax.evaluation.contenders import torch_model
    except ImportError as error:
        yield {"left_out": {"torch": str(error)}, "summary": f"PyTorch left out: {error}"}
        return
    if not (on_cpu or (jax.default_backend() == "gpu" and torch.cuda.is_available())):
        why = f"PyTorch {torch.__version__} has no device of this kind"
        yield {"left_out": {"torch": why}, "summary": why}
        return
    device = torch.device("cpu" if on_cpu else "cuda")
    model = torch_model(bundle).to(device, torch.bfloat16)
    ids = torch.from_numpy(np.array(pool.batch.ids, np.int64)).to(device)
    types = torch.zeros_like(ids)

    def run(forward: Any, rows: int) -> Any:
        with torch.inference_mode():
            parts = zip(ids.split(rows), types.split(rows), strict=True)
            logits = torch.cat([forward(part, None, kinds) for part, kinds in parts]).float()
            return logits.cpu().numpy()  # waits for the device

    by_rows = common.timings(given, {rows: partial(run, model, rows) for rows in given.tiles[-2:]})
    best = min(by_rows, key=lambda rows: by_rows[rows]["median"])
    attention = getattr(model.bert.config, "_attn_implementation", "unknown")
    runs = pool.runs | {"torch": partial(run, model, best)}
    apart = np.abs(run(model, best) - np.asarray(pool.runs["full_depth"]())).max()
    yield {"torch": {"rows": best, "attention": attention, "logit_difference": float(apart)}}
    left_out = {}
    if given.compiles_torch:
        try:
            compiled = torch.compile(model)
            run(compiled, best)
            runs["torch_compile"] = partial(run, compiled, best)
        except Exception as error:
            left_out["torch_compile"] = f"{type(error).__name__}: {str(error)[:300]}"
    else:
        left_out["torch_compile"] = "not on a CPU, where compiling takes longer than this check"
    seconds = common.timings(given, runs)
    yield pool.facts(seconds, peak) | {"left_out": left_out}
    fastest = min(seconds[name]["median"] for name in runs if name.startswith("torch"))
    early, full = (fastest / seconds[name]["median"] for name in ("early_exit", "full_depth"))
    yield {"summary": f"early exit {early:.2f} and full depth {full:.2f} times PyTorch's fastest"}


def training(given: common.Sizes) -> common.Found:
    """A step of training: the joint loss of all exits against the last exit alone."""
    rows, length, cfg = given.step_rows, given.length, given.base
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    config = TrainConfig(dtype="bfloat16")
    batch = common.random_batch(cfg, rows, length, ragged=True)
    labels = np.arange(rows, dtype=np.int32) % 2
    learnt = Rows(batch, labels, np.ones(rows, np.float32), np.arange(rows, dtype=np.int32))
    device = jax.devices()[0]
    runs, flops = {}, {}
    for name, layers in (("joint", given.base_exits), ("last", given.base_exits[-1:])):
        model = EarlyExitBert(cfg, ExitConfig(layers, 2))
        runs[name] = Steps(model, config, learnt, device)
        flops[name] = 3 * rows * last_exit_flops(cfg, model.exits, length)
    seconds = common.timings(given, runs)
    peak = common.matmul_flops(given)
    shares = {name: flops[name] / seconds[name]["median"] / peak for name in runs}
    ratio = seconds["joint"]["median"] / seconds["last"]["median"]
    yield {
        "rows": rows, "tokens_per_row": length, "seconds": seconds, "joint_over_last": ratio,
        "rows_per_second": {name: rows / seconds[name]["median"] for name in runs},
        "share_of_peak": shares, "matmul_flops": peak,
        "summary": f"a joint step takes {ratio:.3f} times one of the last exit alone",
    }  # fmt: skip


class Steps:
    """Calls it to train one step on the same rows."""

    def __init__(self, model: EarlyExitBert, config: TrainConfig, rows: Rows, device: Any) -> None:
        optimizer = make_optimizer(config, 1000)
        self.step = mapped_step(make_train_step(model, optimizer, config), [device], "shard_map")
        start = first_state(common.random_variables(model)["params"], optimizer, config)
        self.state: TrainState = jax.device_put(start, device)
        self.rows = jax.device_put(rows, device)

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.rows)
        return metrics


def loops(given: common.Sizes) -> common.Found:
    """What an iteration of a loop costs on this device, and a branch in it, next to no work."""
    x = jnp.ones((8, 128))

    def body(i: Any, x: Any) -> Any:
        return x * 0.5 + i.astype(jnp.float32)

    def branch(i: Any, x: Any) -> Any:
        branches = [lambda i, x, by=by: body(i + by, x) for by in range(4)]
        return lax.switch(i % 4, branches, i, x)

    def program(work: Any, x: Any, count: Any) -> Any:
        """The number of iterations is known when it runs alone, as in the engine."""
        return lax.while_loop(
            lambda state: state[0] < count, lambda state: (state[0] + 1, work(*state)),
            (jnp.int32(0), x),
        )[1]  # fmt: skip

    few, many = given.loops // 10, given.loops
    programs = {
        "while_loop": jax.jit(partial(program, body)),
        "switch": jax.jit(partial(program, branch)),
    }
    runs = {
        (name, count): partial(run, x, jnp.int32(count))
        for name, run in programs.items()
        for count in (few, many)
    }
    runs["call", 1] = partial(jax.jit(body), jnp.int32(1), x)
    taken = common.timings(given, runs)
    each = {
        name: (taken[name, many]["median"] - taken[name, few]["median"]) / (many - few)
        for name in programs
    }
    loop, switch = each["while_loop"], each["switch"] - each["while_loop"]
    yield {
        "iterations": [few, many], "call": taken["call", 1],
        "while_loop_iteration": loop, "switch": switch,
        "seconds": {f"{name} {count}": of for (name, count), of in taken.items()},
        "summary": f"an iteration takes {1e6 * loop:.2f} µs, a switch {1e6 * switch:.2f} µs more",
    }  # fmt: skip
