"""A Gaussian process over scales by any treatment of the scale: what the alternatives to `scale_shift` have in common.

f(x, s) = constant + level(cell) + g(x, s). The constant and one level for each cell (the runs of one scale) are
integrated out, so no alternative has to foretell how low losses are. Of g, whose covariance is the amplitude times what
a `Treatment` says, all but the treatment is that of the usual model: Matern-5/2 with a lengthscale each, a linear term
in the shares, noise, and the priors of all of them. So a comparison is of treatments alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import gp, process
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GROWN, SETTLED, bend, remembered, sought
from bo.surrogates.hyperparameters import MEAN_VARIANCE, Block, Hyper, Layout, NumericalError
from bo.surrogates.levels import below
from bo.surrogates.process import lift, matern
from bo.surrogates.surrogate import Surrogate
from search_spaces.parameter import Array

Own = Mapping[str, Tensor]
"""The raw numbers of each block of a treatment: p x its shape."""
#: Least variance of the linear term, zero without shares: the root of zero has no slope.
TINY = 1e-12


@dataclass(frozen=True)
class Points:
    """n points, as a treatment sees them.

    x: p x ... x n x D features in lengthscales. shares: p x ... x n x k, those that are shares, as the linear term has
    them. place: p x ... x n x e, what the treatment made of the scale. S: ... x n x m. cell: ... x n.
    """

    x: Tensor
    shares: Tensor
    place: Tensor
    S: Tensor
    cell: Tensor

    def alike(self, other: Points) -> Tensor:
        """The covariance within one scale, over the amplitude: p x ... x n x k."""
        return matern(self.x, other.x) + self.linear(other)

    def linear(self, other: Points) -> Tensor:
        """Its linear term in the shares."""
        return self.shares @ other.shares.mT

    def same(self, other: Points) -> Tensor:
        """One where two points are of one cell: ... x n x k."""
        return (self.cell[..., :, None] == other.cell[..., None, :]).to(torch.float64)


@dataclass(frozen=True)
class Treatment:
    """What an alternative says of the scale.

    blocks: its hyperparameters; a block with an infinite sd has a Gamma prior, see `ScaleLayout.log_prior`.
    place: from n points, their features (p x n x D, not in lengthscales) and its hyperparameters to p x n x e numbers.
    kernel: the covariance of g over the amplitude, p x ... x n x k, positive definite whatever the hyperparameters are.
    starts: values of blocks from which a fit may begin too, where the likeliest may be far from the centre.
    """

    blocks: tuple[Block, ...]
    place: Callable[[Inputs, Tensor, Own], Tensor]
    kernel: Callable[[Points, Points, Own], Tensor]
    starts: tuple[Mapping[str, Array], ...] = ()


@dataclass(frozen=True)
class Scales:
    """The T scales that were run, from small to large. cell: T, their indices.

    places: T x m, of which the first `axes` are octaves; another study is an octave below the target on its own.
    """

    cell: Tensor
    places: Tensor
    axes: int

    @classmethod
    def of(cls, features: Features, inputs: Inputs) -> Scales:
        """Ordered by the octaves of all axes together: by the cost of a run, where they are parameters and tokens."""
        different, which = torch.unique(inputs.cell, return_inverse=True)
        places = torch.zeros(len(different), inputs.S.shape[-1], dtype=torch.float64)
        places[which] = below(inputs.S, len(features.axes))
        order = sorted(range(len(different)), key=lambda i: (float(places[i].sum()), places[i].tolist()))
        return cls(different[order], places[order], len(features.axes))

    def __len__(self) -> int:
        return len(self.cell)

    def row(self, at: Inputs) -> Tensor:
        """Which of them each point has; else T and the number of the next smaller one, of the least if none is: n."""
        known = at.cell[:, None] == self.cell
        smaller = (self.places.sum(-1) < below(at.S, self.axes).sum(-1, keepdim=True)).sum(-1)
        return torch.where(known.any(-1), known.to(torch.long).argmax(-1), len(self) + (smaller - 1).clamp_min(0))

    @property
    def reach(self) -> Tensor:
        """Octaves between the target and the farthest of them on each axis, 1 where all are at the target: m."""
        reach = self.places.abs().amax(0)
        return torch.where(reach > 0, reach, 1.0)

    def fraction(self, S: Tensor) -> Tensor:
        """Runs' places S (n x m) on the way from the farthest of them, 0, to the target, 1, linear in octaves.

        So Klein et al. 2017, "Fast Bayesian optimization of machine learning hyperparameters on large datasets". What
        lies beyond an end is at that end, as BoTorch has it.
        """
        return (1 + below(S, self.axes) / self.reach).clamp(0, 1)


@dataclass(frozen=True)
class ScaleLayout(Layout):
    """The hyperparameters of one scale, and further ones."""

    further: tuple[Block, ...] = ()

    @classmethod
    def of_treatment(cls, features: Features, inputs: Inputs, treatment: Treatment) -> ScaleLayout:
        """Those that the usual model has too have its priors: the level, and its reach."""
        usual = Layout.of(features, inputs, across=True)
        named = {block.name: block for block in usual.blocks}
        shared = ["level", "reach"]
        given = {field.name: getattr(usual, field.name) for field in fields(Layout)}
        further = (*(named[name] for name in shared if name in named), *treatment.blocks)
        return cls(**given | {"across": False, "smooth": False}, further=further)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return *super().blocks, *self.further

    @property
    def sizes(self) -> list[int]:
        return [block.size for block in self.blocks]

    def own(self, theta: Tensor) -> Own:
        """The raw numbers of the further blocks."""
        parts = torch.split(theta, self.sizes, dim=-1)[-len(self.further) :]
        return {b.name: part.reshape(len(theta), *b.shape) for b, part in zip(self.further, parts, strict=True)}

    def log_prior(self, theta: Tensor) -> Tensor:
        """Log density, up to a constant, of the p x H raw numbers: p.

        Those with an infinite sd are logarithms of numbers that are Gamma(3, 3 / e^mean), as lengthscales are.
        """
        total = torch.zeros(len(theta), dtype=torch.float64)
        for block, part in zip(self.blocks, torch.split(theta, self.sizes, dim=-1), strict=True):
            off, sd = part - torch.as_tensor(block.mean), torch.as_tensor(block.sd)
            if bool(torch.isinf(sd).all()):
                total = total + (2 * off - 3 * off.exp()).sum(-1)
            else:
                weight = 1 / len(theta) if block.shared else 1.0
                total = total - 0.5 * weight * (off / sd).square().sum(-1)
        return total


@dataclass(frozen=True)
class Prior:
    """f under a treatment at p x H raw hyperparameters, in the form that `Process` has it."""

    layout: ScaleLayout
    treatment: Treatment
    theta: Tensor

    @cached_property
    def hyper(self) -> Hyper:
        return self.layout.hyper(self.theta)

    @cached_property
    def own(self) -> Own:
        return self.layout.own(self.theta)

    def embed(self, at: Inputs) -> Tensor:
        """b points to p x b x E numbers: those of `Points`, side by side."""
        hyper, k, p = self.hyper, self.layout.shares, len(self.theta)
        first = at.F.shape[-1] - k
        shares = bend(at.F[:, first:], self.layout.centres, hyper.power) if k else at.F[:, first:]
        x = torch.cat([at.F[:, :first] - 0.5, shares], dim=-1).expand(p, -1, -1)
        parts = [
            x / hyper.lengthscale[:, None, list(self.layout.groups)],
            shares * (hyper.linear.clamp_min(TINY) / hyper.amplitude).sqrt()[:, None, None],
            torch.cat([at.S, at.cell[:, None]], dim=-1).expand(p, -1, -1),
            self.treatment.place(at, x, self.own),
        ]
        return torch.cat(parts, dim=-1)

    def points(self, u: Tensor) -> Points:
        sizes = [len(self.layout.groups), self.layout.shares, self.layout.axes, 1]
        x, shares, S, cell, place = torch.split(u, [*sizes, u.shape[-1] - sum(sizes)], dim=-1)
        return Points(x, shares, place, S[0], cell[0, ..., 0])

    def kernel(self, u: Tensor, v: Tensor) -> Tensor:
        """p x ... x n x E and p x ... x k x E -> p x ... x n x k."""
        one, other = self.points(u), self.points(v)
        alike = one.same(other)
        if "reach" in self.own:  # nearly every run is a cell: their levels are alike where they are near
            apart = (one.S[..., :, None, :] - other.S[..., None, :, :]).square()  # ... x n x k x m
            ours = self.layout.axes - self.layout.foreign
            alike = (-0.5 * apart[..., :ours].sum(-1) / lift(self.own["reach"].exp(), u).square()).exp()
            alike = alike * (apart[..., ours:].sum(-1) == 0)
        shape = self.treatment.kernel(one, other, self.own)
        return lift(self.hyper.amplitude, u) * shape + MEAN_VARIANCE + lift(self.own["level"].exp(), u) * alike

    def log_posterior(self, inputs: Inputs, Y: Tensor) -> Tensor:
        """Log marginal likelihood of n runs (Y: n x p) plus log prior, up to a constant: p."""
        u = self.embed(inputs)
        likelihood = process.log_likelihood(self.kernel(u, u), Y, self.hyper.noise, self.hyper.amplitude)
        return likelihood + self.layout.log_prior(self.theta)

    def given(self, features: Features, inputs: Inputs, Y: Tensor, memory: Mapping[str, Any]) -> process.Process:
        """The posterior given n runs."""
        amplitude, noise = self.hyper.amplitude, self.hyper.noise
        none = torch.zeros_like(noise)
        return process.conditioned(features, none, self.embed, self.kernel, inputs, Y, amplitude, noise, memory)


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None,
    treated: Callable[[Features, Inputs], Treatment],
    iterations: int = 60,
) -> Surrogate:
    """Maximum a posteriori hyperparameters of p independent processes, all at once, as `gp.sought` has it.

    Within one cell a treatment has nothing to say: there it is the usual process. Where there are many runs, and hardly
    more than `start` was fitted to, and at no more scales, its hyperparameters are taken as they are. NumericalError
    when no covariance can be factorised.
    """
    n, p = Y.shape
    cells = len(torch.unique(inputs.cell))
    if cells == 1:
        return gp.fit(features, inputs, Y, start)
    treatment = treated(features, inputs)
    layout = ScaleLayout.of_treatment(features, inputs, treatment)

    def loss(raw: Array) -> tuple[float, Array]:
        theta = torch.tensor(raw.reshape(p, -1), requires_grad=True)
        try:
            value = -Prior(layout, treatment, theta).log_posterior(inputs, Y).sum()
        except NumericalError:
            return 1e10, np.zeros_like(raw)  # a line search turns back from here
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy().reshape(-1)

    known, runs = remembered(layout, p, start)
    same = known is not None and (start or {}).get("cells") == cells
    if known is not None and same and SETTLED <= runs <= n < GROWN * runs:
        found = known
    else:
        begins = [np.tile(layout.vector(values), (p, 1)) for values in treatment.starts]
        begins += [] if known is None else [known]
        best = likeliest(begins, layout, treatment, inputs, Y) if begins else None
        found, runs = sought(loss, layout, p, n, best, runs if same else 0, iterations), n
    memory = {"metrics": [layout.names(row) for row in found], "runs": runs, "cells": cells}
    return Prior(layout, treatment, torch.from_numpy(found)).given(features, inputs, Y, memory)


def likeliest(begins: list[Array], layout: ScaleLayout, treatment: Treatment, inputs: Inputs, Y: Tensor) -> Array:
    """For each metric that of several p x H raw hyperparameters under which it is likeliest: p x H."""
    with torch.no_grad():
        each = [Prior(layout, treatment, torch.from_numpy(raw)).log_posterior(inputs, Y) for raw in begins]
    which = torch.stack(each).nan_to_num(-math.inf).argmax(0).tolist()
    return np.stack([begins[k][i] for i, k in enumerate(which)])
