import pytest

from bo.scaling.flops import dense_flops, transformer_flops
from search_spaces import Scale


def test_six_n_d_is_what_a_fidelity_counts() -> None:
    assert dense_flops(1e9, 2e10) == Scale({"params": 1e9, "tokens": 2e10}).flops


def test_the_full_count_is_six_n_d_and_attention() -> None:
    d, h, layers, s = 512, 2048, 8, 1024
    params = layers * (4 * d * d + 2 * d * h)
    full = transformer_flops(tokens=1e9, layers=layers, width=d, hidden=h, sequence=s)
    assert full == pytest.approx(dense_flops(params, 1e9) + 12 * layers * d * s * 1e9)
    causal = transformer_flops(tokens=1e9, layers=layers, width=d, hidden=h, sequence=s, causal=True)
    assert full - causal == pytest.approx(6 * layers * d * s * 1e9)


def test_it_agrees_with_the_step_laws_count_per_token() -> None:
    d, h, layers, s = 960, 9368, 7, 2048  # M = 6 (4 d + 3 h + 2 s) layers d, in step-law/steplaw, fit_tool.py
    gated = transformer_flops(tokens=1, layers=layers, width=d, hidden=h, sequence=s, gated=True)
    assert gated == pytest.approx(6 * (4 * d + 3 * h + 2 * s) * layers * d)


def test_vocabulary_and_narrow_attention_are_counted() -> None:
    base = {"tokens": 10.0, "layers": 2, "width": 64, "hidden": 256, "sequence": 128}
    plain = transformer_flops(**base)
    assert transformer_flops(**base, vocabulary=1000) - plain == pytest.approx(6 * 64 * 1000 * 10)
    assert plain - transformer_flops(**base, attention=32) == pytest.approx(3 * 10 * 2 * (8 * 64 + 4 * 128) * 32)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need tokens to be a finite number > 0, got 0"):
        dense_flops(1e9, 0)
    with pytest.raises(ValueError, match=r"need width to be"):
        transformer_flops(tokens=1, layers=1, width=-1, hidden=1, sequence=1)
    with pytest.raises(ValueError, match="vocabulary of at least 0"):
        transformer_flops(tokens=1, layers=1, width=1, hidden=1, sequence=1, vocabulary=-1)
