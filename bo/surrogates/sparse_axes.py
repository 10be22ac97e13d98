"""A Gaussian process that believes few coordinates matter: sparse axis-aligned subspaces (SAAS), by an ensemble.

Eriksson & Jankowiak 2021, "High-Dimensional Bayesian Optimization with Sparse Axis-Aligned Subspaces", section 4: the
inverse squared lengthscales are half-Cauchy about zero with a scale tau that all share, and tau is half-Cauchy itself.
So all coordinates but a few are of no account unless the runs say otherwise. In place of a Markov chain there is one
maximum a posteriori fit for each of some values of tau, weighted by how well it explains the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bo.surrogates.ensemble import Ensemble
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GROWN, GaussianProcess, LogPosterior
from bo.surrogates.hyperparameters import Block, Layout, NumericalError
from bo.surrogates.scale_shift import ScaleShiftGP, Target
from search_spaces.parameter import Array

#: What the inverse squared lengthscale of a coordinate is about, one member of the ensemble for each: with the largest
#: all coordinates count, with the least hardly one that the runs do not speak for.
TAUS = (1.0, 0.1, 0.01, 0.001)
#: The scale of the half-Cauchy prior of tau, as in the paper.
SCALE = 0.1
#: The shortest lengthscale, in ranges. With few coordinates to choose from, one whose values happen to tell good runs
#: from bad would be given all the credit, at a lengthscale as short as is allowed.
SHORTEST = 0.2
#: From so many runs on, hyperparameters are fitted again only when there are GROWN times more of them: several fits
#: from two starts each take longer than one.
SETTLED = 30


@dataclass(frozen=True)
class SparseLayout(Layout):
    """The usual hyperparameters, with the sparse prior of lengthscales l: l^-2 is half-Cauchy with scale tau."""

    tau: float = SCALE

    @classmethod
    def sparse(cls, layout: Layout, tau: float) -> SparseLayout:
        return cls(**{field.name: getattr(layout, field.name) for field in fields(Layout)}, tau=tau)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        lengthscale, *others = super().blocks
        return replace(lengthscale, low=math.log(SHORTEST)), *others

    def log_prior(self, theta: Tensor) -> Tensor:
        """Log density, up to a constant that is the same for every tau, of the p x H raw numbers: p."""
        usual, t = super().log_prior(theta), self._excess(theta[:, : self.G])
        part = theta[:, : self.G]
        gamma = (2 * part - 6 * part.exp() / torch.from_numpy(self.stretch)).sum(-1)
        density: Tensor = usual - gamma + (t - torch.nn.functional.softplus(2 * t)).sum(-1)
        return density

    def log_prior_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        raw = torch.tensor(theta, requires_grad=True)
        total = self.log_prior(raw).sum()
        (gradient,) = torch.autograd.grad(total, raw)
        return total.item(), gradient.numpy()

    def _excess(self, log_lengthscale: Tensor) -> Tensor:
        """log(l^-2 / tau): its density is that of a half-Cauchy variable's logarithm, 2/pi / (e^t + e^-t)."""
        return -2 * log_lengthscale - math.log(self.tau)

    def centre(self) -> Array:
        """H raw numbers: every lengthscale where its prior is highest, the rest at the centre of its own."""
        found = self.vector()
        found[: self.G] = np.clip(-0.5 * math.log(self.tau), self.bounds[0][0], self.bounds[0][1])
        return found


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    taus: Sequence[float] = TAUS,
    iterations: int = 60,
) -> Ensemble:
    """One fit for each of the falling `taus`, from the fit before it and from where the prior is highest.

    Where there are many runs, and hardly more than `start` was fitted to, its hyperparameters are taken as they are;
    otherwise it counts for nothing, since a fit that let go of a coordinate would hardly take it up again.
    ValueError for a tau that is not above zero; NumericalError when nothing could be fitted.
    """
    if not taus or not all(tau > 0 for tau in taus):
        raise ValueError(f"The ensemble needs a tau above 0 for each of its members, got {tuple(taus)!r}.")
    n, p = Y.shape
    usual = Layout.of(features, inputs, inputs.across)
    known = (start or {}).get("members", ())
    known = known if len(known) == len(taus) and all(len(metrics) == p for metrics in known) else ()
    runs = int((start or {}).get("runs", 0)) if known else 0
    settled = SETTLED <= runs <= n < GROWN * runs
    members: list[GaussianProcess | ScaleShiftGP] = []
    heights = []
    raw = np.tile(usual.vector(), p)
    for k, tau in enumerate(taus):
        layout = SparseLayout.sparse(usual, tau)
        if settled:
            raw = np.concatenate([layout.vector(values) for values in known[k]])
        else:
            # From few coordinates alone the way to those that matter is flat; from the last fit it is only to let go.
            loss = objective(layout, inputs, Y)
            ends = [climbed(loss, begin, layout, p, iterations) for begin in (raw, np.tile(layout.centre(), p))]
            raw = min(ends, key=lambda end: loss(end)[0])
        theta = torch.from_numpy(raw.reshape(p, -1).copy())
        heights.append(
            torch.tensor([-objective(layout, inputs, Y[:, [i]])(row.numpy())[0] for i, row in enumerate(theta)])
        )
        if inputs.across:
            members.append(ScaleShiftGP.given(features, layout, theta, inputs, Y))
        else:
            members.append(GaussianProcess.given(features, layout, theta, inputs.F.detach().numpy(), Y, n))
    ratio = torch.tensor(taus, dtype=torch.float64) / SCALE
    height = torch.stack(heights, dim=-1) + (ratio / (1 + ratio.square())).log()
    if not torch.isfinite(height).any(-1).all():
        raise NumericalError("No fit of the hyperparameters has a finite density.")
    weight = height.nan_to_num(-math.inf, -math.inf, -math.inf).softmax(-1)
    memory = {"members": [member.memory()["metrics"] for member in members], "runs": runs if settled else n}
    return Ensemble(tuple(members), weight, memory)


def objective(layout: SparseLayout, inputs: Inputs, Y: Tensor) -> Callable[[Array], tuple[float, Array]]:
    """Minus the log posterior of p H raw hyperparameters, with its gradient."""
    if not layout.across:
        return LogPosterior(layout, inputs.F.detach().numpy(), Y.numpy()).loss
    return Target.of(inputs, Y, layout).loss


def climbed(
    loss: Callable[[Array], tuple[float, Array]], start: Array, layout: Layout, p: int, iterations: int
) -> Array:
    """Where L-BFGS-B ends; the start itself where that is not finite."""
    options = {"maxiter": iterations, "ftol": 1e-7}
    found: Array = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=layout.bounds * p, options=options).x
    return found if np.isfinite(found).all() else start
