"""The CPU's name and the width of its vectors, as Linux lists them."""

import pytest

from microdit_jax.machine.processor import processor

LISTED = """processor\t: 0
model name\t: A CPU
flags\t\t: fpu {}

processor\t: 1
flags\t\t: fpu
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx avx2 avx512f", "AVX-512"), ("avx avx2", "AVX2"), ("avx", "AVX"), ("sse", "")],
)
def test_the_widest_vectors_are_named(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(LISTED.format(flags))
    assert processor(tmp_path / "cpuinfo") == ("A CPU", expected)


def test_other_systems_and_arm(tmp_path):
    assert processor(tmp_path / "absent").vectors == ""
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimd\n")
    assert processor(tmp_path / "arm").vectors == "NEON"
