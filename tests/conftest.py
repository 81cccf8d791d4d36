"""The harness of the whole suite: eight CPU devices, a cache of its own, strict numerics."""

import os
import tempfile
from importlib.metadata import version

from packaging.version import Version

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# These programs take far longer to compile than to run: unless told otherwise, unoptimised.
_flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "xla_backend_optimization_level" not in _flags[0]:
    _flags.append("--xla_backend_optimization_level=0")
    if Version(version("jaxlib")) < Version("0.11"):  # later ones do not know it, and stop
        _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_flags)
_cache = tempfile.TemporaryDirectory(prefix="ejax-tests-")  # removed when Python ends
os.environ.setdefault("EJAX_CACHE", _cache.name)
# Many tests, and the processes they start, compile the same programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{_cache.name}/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    # A warning that points at our code, or at a test that calls it, is an error.
    for module in (r"ejax(\.|$)", r"train(\.|$)", "test_"):
        config.addinivalue_line("filterwarnings", f"error:::{module}")
    # Trainings of seconds are doubtful; what is doubted has tests of its own.
    config.addinivalue_line("filterwarnings", "ignore::ejax.training.checks.Doubt")


@pytest.fixture(scope="module")
def strict():
    """No silent change of dtype or rank; for a whole module, so that its fixtures obey too."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
