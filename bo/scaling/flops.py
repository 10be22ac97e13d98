"""Floating-point operations of training a transformer, for `Fidelity(cost=...)` and for reports.

6 N D leaves out attention and the vocabulary. They matter exactly where proxies live: with few layers, narrow models,
long sequences. A cost that ignores them makes small runs look cheaper than they are.
"""

from __future__ import annotations

import math


def dense_flops(params: float, tokens: float) -> float:
    """6 N D: 2 operations a parameter and token forwards, 4 backwards (Kaplan et al. 2020, arXiv 2001.08361, 2.1).

    params: without embeddings; of a mixture of experts those that are active.
    """
    return 6.0 * _positive("params", params) * _positive("tokens", tokens)


def transformer_flops(
    *,
    tokens: float,
    layers: float,
    width: float,
    hidden: float,
    sequence: float,
    vocabulary: float = 0,
    attention: float | None = None,
    gated: bool = False,
    causal: bool = False,
) -> float:
    """Operations of training on `tokens` tokens, attention and vocabulary counted: three times the forward pass.

    Forwards, for each token and layer (Hoffmann et al. 2022, arXiv 2203.15556, appendix F, of which the softmax and the
    lookup of embeddings are left out as no products of matrices): 8 d a for queries, keys, values and output, with d
    the width and a the width of all heads together (`attention`, else d); 4 s a for the logits and the weighted sum
    over s positions, half of it where `causal` kernels skip what is masked; 4 d h for an MLP with `hidden` h, 6 d h
    where it is gated (SwiGLU). And 2 d V for the logits of the vocabulary. Backwards is twice forwards.
    """
    d, s, h = _positive("width", width), _positive("sequence", sequence), _positive("hidden", hidden)
    a = d if attention is None else _positive("attention", attention)
    if not (math.isfinite(vocabulary) and vocabulary >= 0):
        raise ValueError(f"transformer_flops needs a finite vocabulary of at least 0, got {vocabulary!r}.")
    layer = 8 * d * a + (2 if causal else 4) * s * a + (6 if gated else 4) * d * h
    return 3.0 * _positive("tokens", tokens) * (_positive("layers", layers) * layer + 2 * d * vocabulary)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"FLOPs need {name} to be a finite number > 0, got {value!r}.")
    return value
