"""What the machine is said to be."""

import jax
import pytest

from ejax import hardware


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f", "float32"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16", "bfloat16"),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16", "float32"),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16 sve", "bfloat16"),
        ("", "float32"),
    ],
)
def test_bfloat16_only_where_it_is_faster(lines, dtype, monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: Some CPU\n{lines}\n")
    monkeypatch.setattr(hardware, "CPUINFO", info)
    assert hardware.fastest_dtype() == dtype
    assert "cores of Some CPU, " in hardware.describe()
    assert ("no fast" in hardware.describe()) == (dtype == "float32")


def test_memory_is_known_on_linux():
    free = hardware.free_bytes(jax.devices()[0])
    assert free is None or free > 1 << 20
