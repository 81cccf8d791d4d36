"""The harness of the whole suite: eight CPU devices, caches of its own, strict numerics."""

import hashlib
import os
import tempfile
import time
from importlib.metadata import version

from packaging.version import Version

from ejax.assets import cache_dir
from ejax.hardware import cpu_type

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# These programs take far longer to compile than to run: unless told otherwise, unoptimised.
_flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "xla_backend_optimization_level" not in _flags[0]:
    _flags.append("--xla_backend_optimization_level=0")
    if Version(version("jaxlib")) < Version("0.11"):  # later ones do not know it, and stop
        _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_flags)
# Compiled programs outlive the run, in the user's cache: tests, their processes and the next run
# compile the same ones. A program is for one jax and one type of CPU.
_made_for = hashlib.sha256(f"{version('jax')} {version('jaxlib')} {cpu_type()}".encode())
_programs = cache_dir() / "tests" / _made_for.hexdigest()[:12]
for _program in _programs.glob("*"):
    if _program.stat().st_mtime < time.time() - 30 * 24 * 60 * 60:
        _program.unlink(missing_ok=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_programs))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
_cache = tempfile.TemporaryDirectory(prefix="ejax-tests-")  # removed when Python ends
os.environ.setdefault("EJAX_CACHE", _cache.name)

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--short", action="store_true", help="of each slow test its first case alone")


def pytest_configure(config):
    # A warning that points at our code, or at a test that calls it, is an error.
    for module in (r"ejax(\.|$)", r"train(\.|$)", "test_"):
        config.addinivalue_line("filterwarnings", f"error:::{module}")
    # Trainings of seconds are doubtful; what is doubted has tests of its own.
    config.addinivalue_line("filterwarnings", "ignore::ejax.training.checks.Doubt")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--short"):
        seen, first, others = set(), [], []
        for item in items:
            test = item.nodeid.partition("[")[0]
            again = item.get_closest_marker("slow") and test in seen
            (others if again else first).append(item)
            seen.add(test)
        items[:] = first
        config.hook.pytest_deselected(items=others)


@pytest.fixture
def quick_profile(monkeypatch):
    """`ejax profile` by single runs: what it measures is coarse, and all else as ever."""
    monkeypatch.setattr("ejax.evaluation.profile.TURNS", 3)
    monkeypatch.setattr("ejax.evaluation.profile.TURN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def strict():
    """No silent change of dtype or rank; for a whole module, so that its fixtures obey too."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
