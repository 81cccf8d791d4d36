"""What importing costs, and what it must not bring along."""

import subprocess
import sys

import pytest

import ejax


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_is_light() -> None:
    """At most 0.3 s on top of jax and flax, the models and the engine included."""
    code = (
        "import time, jax, flax.linen\nstart = time.perf_counter()\nimport ejax\n"
        "ejax.BertModel, ejax.EarlyExitBert, ejax.early_exit, ejax.load_bert\n"
        "print(time.perf_counter() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_importing_brings_no_framework_starts_no_backend_and_sets_no_option() -> None:
    code = (
        "import sys, jax\nbefore = dict(jax.config.values)\nimport ejax, ejax.cli.app\n"
        "for name in ejax.__all__: getattr(ejax, name)\n"
        "from jax._src import xla_bridge\n"
        "print([n for n in ('tensorflow', 'torch', 'transformers') if n in sys.modules])\n"
        "print(before == dict(jax.config.values), bool(xla_bridge._backends))"
    )
    assert python(code).splitlines() == ["[]", "True False"]


def test_every_public_name_is_there() -> None:
    assert sorted(ejax._HOME) == sorted(ejax.__all__) == dir(ejax)
    for name in ejax.__all__:
        assert getattr(ejax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'EarlyExit'"):
        ejax.EarlyExit  # noqa: B018
