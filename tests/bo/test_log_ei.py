from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from bo.acquisition.log_ei import log_ei, log_h


def t(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("z", [-40.0, -37.0, -12.0, -5.0, -1.0001, -1.0, -0.9999, -0.3, 0.0, 0.7, 4.0, 30.0])
def test_log_ei_equals_quadrature(z: float) -> None:
    # E max(z + e, 0) for z < 0, with phi(z) taken out of the integral so that it does not underflow: substitute
    # e = -z + s, then phi(s - z) = phi(z) exp(s z - s^2 / 2).
    if z < 0:
        integral, _ = quad(lambda s: s * math.exp(s * z - 0.5 * s * s), 0, 40 / max(1.0, -z), epsabs=0, epsrel=1e-11)
        reference = math.log(integral) - 0.5 * z * z - 0.5 * math.log(2 * math.pi)
    else:
        value, _ = quad(lambda e: (z + e) * math.exp(-0.5 * e * e), -z, 40, epsrel=1e-12, points=[0.0])
        reference = math.log(value / math.sqrt(2 * math.pi))
    sd, best = 0.3, 2.0
    assert float(log_ei(t(best + sd * z), t(sd), best)) == pytest.approx(math.log(sd) + reference, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("z", [-1e8, -2e3, -1e3, -50.0, -1.0, 0.0, 3.0, 1e8])
def test_log_h_and_its_gradient_are_finite_and_agree_with_differences(z: float) -> None:
    x = t(z).requires_grad_()
    (gradient,) = torch.autograd.grad(log_h(x), x)
    step = 1e-6 * max(1.0, abs(z))
    difference = (log_h(t(z + step)) - log_h(t(z - step))) / (2 * step)
    assert float(gradient) == pytest.approx(float(difference), rel=2e-4, abs=1e-8)


def test_branches_join_without_a_jump() -> None:
    for edge in (-1.0, -1e3):
        left, right = log_h(t(edge * (1 + 1e-12))), log_h(t(edge * (1 - 1e-12)))
        assert float(left) == pytest.approx(float(right), rel=1e-8)


def test_more_mean_and_more_spread_below_the_incumbent_are_worth_more() -> None:
    means = torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert (log_ei(means, t(0.5), 0.0).diff() > 0).all()
    assert (log_ei(t(-1.0), torch.linspace(0.01, 2, 50, dtype=torch.float64), 0.0).diff() > 0).all()
