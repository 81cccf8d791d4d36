"""Fine-tuning from a config to a bundle.

Train all exits together, keep the best checkpoint by dev-A, fit temperatures and
choose the default thresholds on dev-A, report on dev-B and test.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ejax.config import TrainConfig
from ejax.data.frames import as_splits
from ejax.hardware import local_devices
from ejax.inference.cost import zero_in_layers
from ejax.saving import save_bundle
from ejax.training.log import Callback
from ejax.training.loop import make_logits
from ejax.training.loop import train as fit
from ejax.training.ngrams import trained_zero
from ejax.training.outcome import (
    answers,
    bundle_of,
    calibrated,
    warn_of_doubts,
    write_result,
)
from ejax.training.processes import Stopped, Terminated, barrier
from ejax.training.refit import with_refitted_heads
from ejax.training.setup import places, set_up


def finetune(
    config: TrainConfig,
    workdir: str | Path,
    *,
    train: Any = None,
    dev: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Trains, calibrates and saves a bundle; called again, it resumes where it was.

    Args:
      config: everything the result depends on.
      workdir: checkpoints, metrics.jsonl, TensorBoard files and result.json go here; a
        folder that all hosts share, or gs://.
      train, dev, test: rows in place of files: a list of dicts by column, a pandas DataFrame or a
        Hugging Face `Dataset`; train may be a dict of them by split, such as a `DatasetDict`. To
        resume, give the same rows.
      output: the bundle's folder; None means workdir/bundle.
      console: where progress is shown; None means standard error.
      callbacks: objects with a method `on_log(step, kind, metrics)`, told of each line of
        metrics.jsonl on the first host, see `ejax.training.log.Callback`.

    Returns:
      The bundle's folder.

    Raises:
      ValueError: on bad data, a bad config, or a workdir of another config.
      Stopped: after SIGTERM, once all is saved.
    """
    local_devices()  # or a sentence
    started, first_host = time.time(), jax.process_index() == 0
    console = console or Console(stderr=True, quiet=not first_host)
    workdir, output = places(workdir, output)

    # Config -> pretrained encoder, exits, tokens of train, dev-A, dev-B and test. Bad input is
    # refused here, before anything is written.
    setup = set_up(config, workdir, console, as_splits(train, dev, test))

    # Exit 0 reads n-grams, not the encoder: it is trained alone, once.
    zero = trained_zero(setup.train, setup.exits, setup.config, workdir, console)

    # The exits after layers and the encoder, together; of all checkpoints the best on dev-A.
    logits_of = make_logits(setup)
    trained = fit(setup, logits_of, workdir, console, callbacks)
    with Terminated() as terminated:
        params = with_refitted_heads(setup, trained.params, workdir, console)
        trained = trained._replace(params=params)
        if terminated.at(trained.last_step + 1):
            raise Stopped("stopped by SIGTERM, all saved: the same command resumes.")

    # From dev-A what exit 0 adds to later exits, temperatures and default thresholds; what they
    # give on dev-A, dev-B and test.
    with console.status("calibrating"):
        dev_a = setup.held_out["dev_a"].encoded
        parts = {
            name: answers(split, zero, logits_of(split, trained.params))
            for name, split in setup.held_out.items()
        }
        exits, evidence, parts, chosen = calibrated(
            setup.exits, parts, config,
            exit0_cost=zero_in_layers(
                setup.cfg, setup.exits, dev_a.lengths, dev_a.whole_lengths
            ),
            console=console,
        )  # fmt: skip

    # One host writes the bundle, and says where its result may be worth less than hoped.
    if first_host:
        zero |= {"evidence": evidence}
        save_bundle(bundle_of(setup, exits, zero, trained, chosen), output)
        with console.status("compared with a linear model on the frozen encoder"):
            warn_of_doubts(setup, parts["dev_a"], exits, chosen, workdir)
        write_result(setup, trained, chosen, workdir, started)
    barrier("the bundle is saved")
    return output
