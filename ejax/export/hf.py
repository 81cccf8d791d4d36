"""A bundle's last exit as a plain Hugging Face classifier."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ejax import storage
from ejax.bundle import Bundle
from ejax.errors import UserError
from ejax.models.weights import to_hf
from ejax.saving import hf_config, replacing


def export_hf(bundle: Bundle, folder: str | Path) -> Path:
    """Writes what `BertForSequenceClassification.from_pretrained` loads: full depth, no exits.

    Its logits are those of the last exit before temperature, without what exit 0 adds to them.

    Raises:
      ValueError: when the last exit is no such classifier, or `folder` is a bundle or cannot
        be written.
    """
    folder = storage.path_of(folder)
    with storage.reaching(folder):
        if (folder / "exits.json").exists():
            raise UserError(
                f"{folder} is a bundle, which a plain classifier would replace: "
                f"choose another output folder."
            )
    bundle.check_weights("ejax export")
    exits = bundle.exits
    if bundle.task.metric != "accuracy":
        raise UserError(
            f"export is for bundles of one label per text: a plain classifier does not hold what "
            f"this one of {exits.problem_type} answers by."
        )
    if exits.pooling != "cls" or (exits.mix != "last" and exits.num_layers > 1):
        raise UserError(
            f"this bundle has pooling {exits.pooling!r} and mix {exits.mix!r}: a plain Hugging "
            f"Face classifier reads the first token of the last layer: train with pooling=cls "
            f"and mix=last to export."
        )
    params = bundle.variables["params"]
    head = params["heads"]["exits"]
    encoder = to_hf({name: params["bert"][name] for name in ("embeddings", "layers")}, bundle.cfg)
    tensors = encoder | {
        "bert.pooler.dense.weight": head["dense"]["kernel"][-1].T,
        "bert.pooler.dense.bias": head["dense"]["bias"][-1],
        "classifier.weight": head["classifier"]["kernel"][-1].T,
        "classifier.bias": head["classifier"]["bias"][-1],
    }
    made = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    config = hf_config(bundle) | {"architectures": ["BertForSequenceClassification"]}
    with replacing(folder) as fresh:
        save_file(made, fresh / "model.safetensors", metadata={"format": "pt"})
        bundle.tokenizer.save(fresh)
        settings = bundle.tokenizer.hf_settings() | {"model_max_length": bundle.max_length}
        for name, values in (("config.json", config), ("tokenizer_config.json", settings)):
            text = json.dumps(values, indent=2, ensure_ascii=False)
            (fresh / name).write_text(text + "\n", encoding="utf-8")
    return folder
