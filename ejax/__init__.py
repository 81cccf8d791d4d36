"""BERT classifiers that stop at the first layer that is sure, in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ejax.bundle import Bundle, load_bundle
    from ejax.calibration.temperature import fit_temperatures
    from ejax.classifier import EarlyExitClassifier
    from ejax.config import BertConfig, DataConfig, ExitConfig, TrainConfig
    from ejax.inference.engine import early_exit, full_depth
    from ejax.inference.policy import select_exit
    from ejax.models.bert import Batch, BertModel, EncoderLayer
    from ejax.models.early_exit import EarlyExitBert
    from ejax.models.heads import ExitHeads
    from ejax.models.weights import load_bert, with_pretrained
    from ejax.saving import save_bundle
    from ejax.sklearn import EarlyExitTextClassifier
    from ejax.training.finetune import finetune

# The public names by the module that has them, imported when one is first used.
_NAMES = {
    "bundle": ("Bundle", "load_bundle"),
    "calibration.temperature": ("fit_temperatures",),
    "classifier": ("EarlyExitClassifier",),
    "config": ("BertConfig", "DataConfig", "ExitConfig", "TrainConfig"),
    "inference.engine": ("early_exit", "full_depth"),
    "inference.policy": ("select_exit",),
    "models.bert": ("Batch", "BertModel", "EncoderLayer"),
    "models.early_exit": ("EarlyExitBert",),
    "models.heads": ("ExitHeads",),
    "models.weights": ("load_bert", "with_pretrained"),
    "saving": ("save_bundle",),
    "sklearn": ("EarlyExitTextClassifier",),
    "training.finetune": ("finetune",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    "Batch",
    "BertConfig",
    "BertModel",
    "Bundle",
    "DataConfig",
    "EarlyExitBert",
    "EarlyExitClassifier",
    "EarlyExitTextClassifier",
    "EncoderLayer",
    "ExitConfig",
    "ExitHeads",
    "TrainConfig",
    "early_exit",
    "finetune",
    "fit_temperatures",
    "full_depth",
    "load_bert",
    "load_bundle",
    "save_bundle",
    "select_exit",
    "with_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _installed()
    elif name in _HOME:
        value = getattr(import_module(f"ejax.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'ejax' has no attribute {name!r}")
    globals()[name] = value  # a submodule of the same name must not stand in its place
    return value


def _installed() -> str:
    from importlib import metadata

    try:
        return metadata.version("ejax")
    except metadata.PackageNotFoundError:
        return "not installed"  # run from a working tree


def __dir__() -> list[str]:
    return sorted(__all__)
