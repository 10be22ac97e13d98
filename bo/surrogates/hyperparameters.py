"""Hyperparameters of the Gaussian processes: which a space has, their priors, and how they lie in a vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.dataset import scattered
from bo.surrogates.features import DRIFT_SD, Features, Inputs

#: How much smoother than in numbers losses are in shares, whose features lie close together.
SMOOTH = 3.0
#: Runs up to which the exact process is the better choice.
EXACT = 2500
#: Prior variance of the constant mean, integrated out; outcomes are standardised.
MEAN_VARIANCE = 1.0
#: Added to the diagonal of every covariance, relative to the amplitude.
JITTER = 1e-8
#: Degrees of freedom of what is believed of drifts: data overrule it.
TAILS = 3.0
#: Standard deviation of how far the optimum of another study lies from that of this one, in octaves.
DISPLACED = 1.0
#: The power under which losses of real mixtures are smoothest, and mixtures from which on it is learned.
POWER = 1 / 3
ENOUGH_MIXTURES = 20
#: Noise of a run that is believed, not measured, as a share of a measured one's: with all of it, several runs would be
#: sent to the same place to average it out, before the first has come back.
BELIEVED_NOISE = 1e-3


class NumericalError(ArithmeticError):
    """A covariance stayed singular whatever was added to its diagonal, or a fit ended at something not finite."""


@dataclass(frozen=True)
class Block:
    """One kind of hyperparameter, as the raw numbers that are fitted: a normal prior with mean and sd, and bounds."""

    name: str
    shape: tuple[int, ...]
    mean: float | np.ndarray
    sd: float | np.ndarray
    low: float
    high: float
    heavy: bool = False
    """Of Student's distribution with TAILS degrees of freedom in place of a normal one: what is far off is believed."""
    shared: bool = False
    """One for all metrics: the mean of what is fitted for each, whose priors together weigh as one."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of p metrics, the batch dimension first.

    lengthscale: p x G. amplitude, noise, linear: p (variances). drift: p x J x m mean drifts and spread: p x m, their
    standard deviations, in octaves an octave. level, residual: p, variances of a cell's own constant and, as a share of
    the amplitude, of its own function. reach: p, octaves over which these stay alike where scales are no cells.
    louder: p x m, growth of the log noise variance an octave. power: one number for all metrics, the power of shares.
    """

    lengthscale: Tensor
    amplitude: Tensor
    noise: Tensor
    linear: Tensor
    drift: Tensor
    spread: Tensor
    level: Tensor
    residual: Tensor
    reach: Tensor
    louder: Tensor
    power: Tensor


@dataclass(frozen=True)
class Layout:
    """Which hyperparameters there are for a space and a set of cells, and how they lie in one vector of H numbers.

    groups: group of each feature (D). drift_unit: J. centres: the middle of each feature that is a share. axes: scale
    axes, the last `foreign` of which are other studies. across: there are several cells. bent: there are enough
    mixtures to learn the power of their shares. smooth: most runs are alone at their scale. believed: means and
    standard deviations of the drifts, J x (m - foreign) each, None where nothing is believed of them.
    """

    groups: tuple[int, ...]
    drift_unit: Tensor
    centres: Tensor
    axes: int
    across: bool
    bent: bool
    foreign: int = 0
    smooth: bool = False
    believed: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, features: Features, inputs: Inputs, across: bool) -> Layout:
        """For n points of a space, over several scales or within one."""
        bent = mixtures(inputs, len(features.centres)) >= ENOUGH_MIXTURES
        axes = inputs.S.shape[-1]
        smooth = across and scattered(inputs.cell)
        foreign, drift = axes - len(features.axes), features.believed_drift if features.drift else None
        return cls(features.groups, features.drift_unit, features.centres, axes, across, bent, foreign, smooth, drift)

    @cached_property
    def G(self) -> int:
        return max(self.groups) + 1

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Everything positive is fitted by its logarithm. Lengthscales are Gamma(3, 6) times `stretch`: see there."""
        ln, stretch, J = math.log, self.stretch, len(self.drift_unit)

        def own(here: float, elsewhere: float) -> np.ndarray:
            """Of each axis: one number for those of scale, another for other studies."""
            return np.array([here] * (self.axes - self.foreign) + [elsewhere] * self.foreign)

        table = [
            Block("lengthscale", (self.G,), np.log(0.5 * stretch), math.inf, ln(0.03), ln(30.0)),
            Block("amplitude", (), ln(2.0), 1.0, ln(0.02), ln(200.0)),
            Block("noise", (), ln(3e-4), 2.5, ln(1e-8), ln(1.0)),
        ]
        if self.shares:
            table.append(Block("linear", (), ln(0.5), 1.5, ln(1e-3), ln(100.0)))
        if self.bent:
            table.append(Block("power", (), ln(POWER), 0.4, ln(0.2), ln(1.0), shared=True))
        if self.across:
            drift, drift_sd = np.zeros((J, self.axes)), np.tile(own(DRIFT_SD, DISPLACED), (J, 1))
            if self.believed is not None:
                ours = self.axes - self.foreign
                drift[:, :ours], drift_sd[:, :ours] = (part.numpy() for part in self.believed)
            table += [
                Block(
                    "drift",
                    (J, self.axes),
                    drift.reshape(-1),
                    drift_sd.reshape(-1),
                    -3.0,
                    3.0,
                    heavy=self.believed is not None,
                ),
                Block("spread", (self.axes,), np.log(own(0.15, 0.5)), 0.7, ln(0.01), ln(4.0)),
                Block("level", (), ln(0.25), 1.0, ln(1e-3), ln(20.0)),
                Block("residual", (), ln(0.3), 1.0, ln(1e-4), ln(5.0)),
                Block("louder", (self.axes,), 0.0, own(0.2, 0.5), -2.0, 2.0),
            ]
        if self.smooth:
            table.append(Block("reach", (), ln(3.0), 0.7, ln(0.3), ln(30.0)))
        return tuple(table)

    @property
    def shares(self) -> int:
        """Number of features that are shares; they come last."""
        return len(self.centres)

    @cached_property
    def stretch(self) -> np.ndarray:
        """What the lengthscale of each group (G) is expected to be, next to that of one of two numbers.

        Two coordinates are the case the prior was chosen for; distances grow with the root of the dimension, Hvarfner
        et al., "Vanilla Bayesian Optimization Performs Great in High Dimensions", arXiv 2402.02229, section 4.
        """
        stretch = np.full(self.G, math.sqrt(max(1.0, self.G / 2)))
        stretch[self.G - self.shares :] *= SMOOTH
        return stretch

    def vector(self, values: Mapping[str, Any] | None = None) -> np.ndarray:
        """H raw numbers: of each block what `values` holds, where it fits, and the centre of its prior elsewhere."""
        parts = []
        for block in self.blocks:
            given = np.asarray((values or {}).get(block.name, math.nan), dtype=np.float64).reshape(-1)
            fits = given.shape == (block.size,) and bool(np.isfinite(given).all())
            parts.append(np.clip(given, block.low, block.high) if fits else np.full(block.size, block.mean))
        return np.concatenate(parts)

    def names(self, vector: np.ndarray) -> dict[str, list[float]]:
        """The raw numbers by block, as JSON holds them."""
        stops = np.cumsum([block.size for block in self.blocks])
        parts = np.split(vector, stops[:-1])
        return {b.name: [round(v, 6) for v in part.tolist()] for b, part in zip(self.blocks, parts, strict=True)}

    @property
    def bounds(self) -> list[tuple[float, float]]:
        return [(block.low, block.high) for block in self.blocks for _ in range(block.size)]

    def hyper(self, theta: Tensor) -> Hyper:
        """theta: p x H raw numbers."""
        p = len(theta)
        sizes = [block.size for block in self.blocks]
        raw = {
            block.name: part.reshape(p, *block.shape)
            for block, part in zip(self.blocks, torch.split(theta, sizes, dim=-1), strict=True)
        }
        zero = torch.zeros(p, dtype=torch.float64)
        J, m = len(self.drift_unit), self.axes
        return Hyper(
            lengthscale=raw["lengthscale"].exp(),
            amplitude=raw["amplitude"].exp(),
            noise=raw["noise"].exp(),
            linear=raw["linear"].exp() if self.shares else zero,
            drift=raw["drift"] if self.across else torch.zeros(p, J, m, dtype=torch.float64),
            spread=raw["spread"].exp() if self.across else torch.zeros(p, m, dtype=torch.float64),
            level=raw["level"].exp() if self.across else zero,
            residual=raw["residual"].exp() if self.across else zero,
            reach=raw["reach"].exp() if self.smooth else zero,
            louder=raw["louder"] if self.across else torch.zeros(p, m, dtype=torch.float64),
            power=raw["power"].mean().exp() if self.bent else torch.tensor(POWER, dtype=torch.float64),
        )

    def log_prior_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """`log_prior` of all p x H raw numbers together, and its gradient."""
        total, gradient, at = 0.0, np.zeros_like(theta), 0
        for block in self.blocks:
            columns = slice(at, at := at + block.size)
            part = theta[:, columns]
            if block.name == "lengthscale":
                density = 6 * np.exp(part) / self.stretch
                total += float((2 * part - density).sum())
                gradient[:, columns] = 2 - density
            else:
                weight = 1 / len(theta) if block.shared else 1.0
                off = (part - block.mean) / block.sd
                if block.heavy:
                    total -= (TAILS + 1) / 2 * float(np.log1p(np.square(off) / TAILS).sum())
                    gradient[:, columns] = -(TAILS + 1) * off / (TAILS + np.square(off)) / block.sd
                    continue
                total -= 0.5 * weight * float(np.square(off).sum())
                gradient[:, columns] = -weight * off / block.sd
        return total, gradient

    def log_prior(self, theta: Tensor) -> Tensor:
        """Log density, up to a constant, of the p x H raw numbers: p."""
        sizes = [block.size for block in self.blocks]
        total = torch.zeros(len(theta), dtype=torch.float64)
        for block, part in zip(self.blocks, torch.split(theta, sizes, dim=-1), strict=True):
            if block.name == "lengthscale":  # Gamma(3, 6), of the lengthscale
                total = total + (2 * part - 6 * part.exp() / torch.from_numpy(self.stretch)).sum(-1)
            else:
                weight = 1 / len(theta) if block.shared else 1.0
                mean, sd = (torch.as_tensor(value, dtype=torch.float64) for value in (block.mean, block.sd))
                square = ((part - mean) / sd).square()
                if block.heavy:
                    square = (TAILS + 1) * torch.log1p(square / TAILS)
                total = total - 0.5 * weight * square.sum(-1)
        return total


def mixtures(inputs: Inputs, shares: int) -> int:
    """How many different mixtures there are among points with so many shares."""
    return len(torch.unique((1e6 * inputs.F[:, inputs.F.shape[-1] - shares :]).round(), dim=0)) if shares else 0
