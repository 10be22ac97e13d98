"""The exact Gaussian process of one scale: Matern-5/2 with a lengthscale each, in closed form.

A search asks it thousands of times a minute, so values and gradients are a few matrix products in numpy: the marginal
likelihood with the gradient of all hyperparameters, the posterior with the gradient of the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.function import once_differentiable

from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import BELIEVED_NOISE, JITTER, MEAN_VARIANCE, POWER, Hyper, Layout, NumericalError
from search_spaces.parameter import Array

#: From so many runs on, hyperparameters are fitted again only when there are so many times more of them.
SETTLED, GROWN = 100, 1.05
#: Share of noise from which a fit begins too, when there are so many times more runs.
NOISY, RESOUGHT = 0.1, 1.2


def matern(r2: Tensor) -> Tensor:
    """Matern-5/2 of squared distances, with a finite gradient at zero."""
    r = (5 * r2 + 1e-20).sqrt()
    return (1 + r + r.square() / 3) * torch.exp(-r)


def bend(root_shares: Tensor, centres: Tensor, power: Tensor) -> Tensor:
    """Shares w (n x k, given as their cube roots) at a power q: c^(1/3) ((w / c)^q - 1) / (3 q).

    With c the share when all are equal, and w^(1/3) - c^(1/3) at q = 1/3: whatever the power, about equal shares they
    lie as far apart, so a lengthscale means the same.
    """
    root = centres.pow(1 / 3)
    bent: Tensor = root * ((root_shares / root).pow(3 * power) - 1) / (3 * power)
    return bent


@dataclass(frozen=True)
class Kernel:
    """The covariance of one metric at fixed hyperparameters: a M(r) + linear s's + a constant.

    width: D, the lengthscale of each feature. amplitude, linear, noise: variances. root: c^(1/3) of each share.
    """

    width: Array
    amplitude: float
    linear: float
    noise: float
    power: float
    root: Array

    @property
    def first(self) -> int:
        """Number of features before the shares."""
        return len(self.width) - len(self.root)

    def bent(self, F: Array) -> Array:
        """Features with shares at their power: n x D."""
        if not len(self.root):
            return F
        shares = self.root * ((F[:, self.first :] / self.root) ** (3 * self.power) - 1) / (3 * self.power)
        return np.concatenate([F[:, : self.first], shares], axis=1)

    def between(self, A: Array, B: Array) -> tuple[Array, Array]:
        """Covariance of bent features, n x k, and the derivative of its first term by the squared distance."""
        r = np.sqrt(5 * squared_distances(A / self.width, B / self.width))
        decay = self.amplitude * np.exp(-r)
        slope = (-5 / 6) * decay * (1 + r)
        K = decay * (1 + r * (1 + r / 3)) + MEAN_VARIANCE
        if len(self.root):
            K += self.linear * (A[:, self.first :] @ B[:, self.first :].T)
        return K, slope

    def diagonal(self, A: Array) -> Array:
        """Prior variances at bent features: n."""
        constant = self.amplitude + MEAN_VARIANCE
        return np.asarray(constant + self.linear * np.square(A[:, self.first :]).sum(1))

    def gradient(self, A: Array, B: Array, slope: Array, G: Array) -> Array:
        """What a gradient G (n x k) of the covariance is for the bent features A: n x D."""
        V = G * slope
        found: Array = 2 * (A * V.sum(1)[:, None] - V @ B) / np.square(self.width)
        if len(self.root):
            found[:, self.first :] += self.linear * (G @ B[:, self.first :])
        return found

    def unbent(self, F: Array, gradient: Array) -> Array:
        """The gradient of features, from that of bent ones."""
        if not len(self.root):
            return gradient
        steep = (F[:, self.first :] / self.root) ** (3 * self.power - 1)
        return np.concatenate([gradient[:, : self.first], gradient[:, self.first :] * steep], axis=1)


def squared_distances(A: Array, B: Array) -> Array:
    """Between the rows of n x D and k x D: n x k."""
    product = A @ B.T
    product *= -2
    product += np.square(A).sum(1)[:, None]
    product += np.square(B).sum(1)
    return np.maximum(product, 0.0, out=product)


@dataclass(frozen=True)
class Factor:
    """A lower Cholesky factor of n x n, and how it is solved with."""

    L: Array

    @classmethod
    def of(cls, K: Array, amplitude: float) -> Factor:
        """Of a covariance, with the least jitter (relative to `amplitude`) needed; K is overwritten."""
        jitter, added = JITTER, 0.0
        while jitter < 1e-2:
            K[np.diag_indices_from(K)] += jitter * amplitude - added
            L, info = lapack.dpotrf(K, lower=1, clean=1)
            if info == 0:
                return cls(L)
            added = jitter * amplitude
            jitter *= 100
        raise NumericalError(f"A covariance of {len(K)} runs stayed singular with a jitter of 1% of its amplitude.")

    def half(self, B: Array) -> Array:
        """L^-1 B."""
        solved: Array = lapack.dtrtrs(self.L, B, lower=1)[0]
        return solved

    def rest(self, B: Array) -> Array:
        """L^-T B."""
        solved: Array = lapack.dtrtrs(self.L, B, lower=1, trans=1)[0]
        return solved

    @property
    def inverse(self) -> Array:
        """Of L L': n x n."""
        lower, _ = lapack.dpotri(self.L, lower=1)
        return np.asarray(np.tril(lower) + np.tril(lower, -1).T)

    @property
    def log_root_determinant(self) -> float:
        return float(np.log(self.L.diagonal()).sum())

    def grown(self, cross: Array, block: Array, amplitude: float) -> Factor:
        """With r more rows: their covariance with the n old ones (n x r) and among themselves (r x r)."""
        n, r = cross.shape
        low = self.half(cross)  # n x r
        L = np.zeros((n + r, n + r), order="F")
        L[:n, :n], L[n:, :n] = self.L, low.T
        L[n:, n:] = Factor.of(block - low.T @ low, amplitude).L
        return Factor(L)


@dataclass(frozen=True)
class Watched:
    """The posterior at b points, for as long as only believed runs are added.

    F: b x D. mean, variance: p x b. half: L^-1 K(X, F) of each metric, n x b.
    """

    F: Array
    mean: Tensor
    variance: Tensor
    half: tuple[Array, ...]


@dataclass(frozen=True)
class GaussianProcess:
    """The posterior of p metrics given n runs, of which the last `believed` are not measured.

    theta: p x H raw hyperparameters. F: n x D features. factors: of the covariance with noise, one a metric. alpha: its
    inverse times the outcomes, p x n. runs: number of runs that the hyperparameters were fitted to. watched: points
    that are asked about again and again, see `watch`.
    """

    features: Features
    layout: Layout
    theta: Tensor
    F: Array
    Y: Tensor
    factors: tuple[Factor, ...]
    alpha: tuple[Array, ...]
    runs: int
    believed: int = 0
    watched: Watched | None = None

    @classmethod
    def given(
        cls, features: Features, layout: Layout, theta: Tensor, F: Array, Y: Tensor, runs: int
    ) -> GaussianProcess:
        """The posterior under fixed hyperparameters; NumericalError when the covariance cannot be factorised."""
        factors, alpha = [], []
        for kernel, y in zip(kernels(layout, theta), Y.numpy().T, strict=True):
            A = kernel.bent(F)
            K, _ = kernel.between(A, A)
            K[np.diag_indices_from(K)] += kernel.noise
            factors.append(Factor.of(K, kernel.amplitude))
            alpha.append(factors[-1].rest(factors[-1].half(y)))
        return cls(features, layout, theta, F, Y, tuple(factors), tuple(alpha), runs)

    @cached_property
    def hyper(self) -> Hyper:
        return self.layout.hyper(self.theta)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        return kernels(self.layout, self.theta)

    @cached_property
    def bent(self) -> tuple[Array, ...]:
        """The runs' features as each metric's kernel sees them."""
        return tuple(kernel.bent(self.F) for kernel in self.kernels)

    @property
    def log_evidence(self) -> float:
        """Log density of the outcomes and the hyperparameters together, up to a constant."""
        return -LogPosterior(self.layout, self.F[: len(self.Y)], self.Y.numpy()).loss(self.theta.numpy().reshape(-1))[0]

    @property
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures, shape (p,)."""
        return self.hyper.noise

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        if at.F.requires_grad and torch.is_grad_enabled():
            mean, variance = _Posterior.apply(at.F, self)  # type: ignore[no-untyped-call]
            return mean, variance
        F = at.F.detach().numpy()
        if self.watched is not None and np.array_equal(F, self.watched.F):
            return self.watched.mean, self.watched.variance
        return self.moments(F)[:2]

    def moments(self, F: Array) -> tuple[Tensor, Tensor, list[tuple[Array, Array, Array]]]:
        """Mean and variance at b x D features, and for each metric bent features, kernel slope and L^-1 K(X, x)."""
        mean, variance, parts = np.empty((len(self.kernels), len(F))), np.empty((len(self.kernels), len(F))), []
        for i, (kernel, factor) in enumerate(zip(self.kernels, self.factors, strict=True)):
            A = kernel.bent(F)
            cross, slope = kernel.between(A, self.bent[i])
            half = factor.half(cross.T)
            mean[i] = cross @ self.alpha[i]
            variance[i] = np.maximum(kernel.diagonal(A) - np.einsum("nb,nb->b", half, half), 1e-10 * kernel.amplitude)
            parts.append((A, slope, half))
        return torch.from_numpy(mean), torch.from_numpy(variance), parts

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        if at.F.requires_grad and torch.is_grad_enabled():
            return self.posterior(at)[0]
        F, n = at.F.detach().numpy(), len(self.Y)
        own = n if np.array_equal(F[:n], self.F[:n]) else 0
        found = np.empty((len(self.kernels), len(F)))
        for i, (kernel, bent, alpha) in enumerate(zip(self.kernels, self.bent, self.alpha, strict=True)):
            found[i, :own] = self._at_runs[i, :own]
            if own < len(F):
                found[i, own:] = kernel.between(kernel.bent(F[own:]), bent[:n])[0] @ alpha[:n]
        return torch.from_numpy(found)

    @cached_property
    def _at_runs(self) -> Array:
        """The mean at the measured runs, p x n: what was measured, less what was added to the diagonal times alpha."""
        n, found = len(self.Y), self.Y.numpy().T.copy()
        for i, (kernel, factor) in enumerate(zip(self.kernels, self.factors, strict=True)):
            L = factor.L[:n, :n]
            added = np.einsum("ij,ij->i", L, L) - kernel.diagonal(self.bent[i][:n])
            found[i] -= added * self.alpha[i][:n]
        return found

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each."""
        mean, half = self._reduced(at.F)  # p x b q, p x n x b q
        groups = at.F.reshape(-1, q, at.F.shape[-1])
        split = half.reshape(len(half), half.shape[1], -1, q).transpose(1, 2)  # p x b x n x q
        return mean.reshape(len(mean), -1, q), self._prior(groups, groups) - split.mT @ split

    def covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """Posterior covariance between b and k points: p x b x k."""
        (_, one), (_, two) = self._reduced(at.F), self._reduced(other.F)
        return self._prior(at.F, other.F) - one.mT @ two

    def _reduced(self, F: Tensor) -> tuple[Tensor, Tensor]:
        """Mean at b points (p x b), and what the runs explain of their covariance as half' half (half: p x n x b)."""
        cross = self._prior(torch.from_numpy(self.F), F)  # p x n x b
        alpha = torch.from_numpy(np.stack(self.alpha))
        chol = torch.from_numpy(np.stack([factor.L for factor in self.factors]))
        return (alpha[:, None] @ cross).squeeze(-2), torch.linalg.solve_triangular(chol, cross, upper=False)

    def _prior(self, a: Tensor, b: Tensor) -> Tensor:
        """Prior covariances of ... x n x D and ... x k x D features: p x ... x n x k."""
        first = a.shape[-1] - self.layout.shares
        kernels = []
        for i, kernel in enumerate(self.kernels):
            A, B = (
                torch.cat([F[..., :first], bend(F[..., first:], self.layout.centres, self.hyper.power)], dim=-1)
                for F in (a, b)
            )
            width = torch.from_numpy(kernel.width)
            r2 = ((A / width)[..., :, None, :] - (B / width)[..., None, :, :]).square().sum(-1)
            linear = self.hyper.linear[i] * (A[..., first:] @ B[..., first:].mT)
            kernels.append(kernel.amplitude * matern(r2) + MEAN_VARIANCE + linear)
        return torch.stack(kernels)

    def watch(self, at: Inputs) -> GaussianProcess:
        """The same, with the posterior at b points kept: there a believed run then costs O(n b), not O(n^2 b)."""
        F = at.F.detach().numpy()
        mean, variance, parts = self.moments(F)
        return replace(self, watched=Watched(F, mean, variance, tuple(half for *_, half in parts)))

    def believe(self, at: Inputs) -> GaussianProcess:
        """Conditioned on its own posterior mean at r points: there the variance shrinks, no mean changes.

        The kriging believer of Ginsbourger et al. 2010, "Kriging is well-suited to parallelize optimization".
        """
        F, factors = at.F.detach().numpy(), []
        for i, (kernel, factor) in enumerate(zip(self.kernels, self.factors, strict=True)):
            A = kernel.bent(F)
            cross, _ = kernel.between(self.bent[i], A)
            block, _ = kernel.between(A, A)
            block[np.diag_indices_from(block)] += kernel.noise * BELIEVED_NOISE
            factors.append(factor.grown(cross, block, kernel.amplitude))
        # What is believed is what was foretold, so it adds nothing to the mean anywhere.
        alpha = tuple(np.concatenate([a, np.zeros(len(F))]) for a in self.alpha)
        return replace(
            self,
            F=np.concatenate([self.F, F]),
            factors=tuple(factors),
            alpha=alpha,
            believed=self.believed + len(F),
            watched=None if self.watched is None else self._seen(self.watched, F, factors),
        )

    def _seen(self, watched: Watched, F: Array, factors: Sequence[Factor]) -> Watched:
        """The watched points once runs at r x D features are believed, by the `factors` with their rows."""
        n, half, variance = len(self.F), [], watched.variance.numpy().copy()
        for i, (kernel, factor) in enumerate(zip(self.kernels, factors, strict=True)):
            cross, _ = kernel.between(kernel.bent(F), kernel.bent(watched.F))
            rows = Factor(factor.L[n:, n:]).half(cross - factor.L[n:, :n] @ watched.half[i])  # r x b
            variance[i] = np.maximum(variance[i] - np.square(rows).sum(0), 1e-10 * kernel.amplitude)
            half.append(np.concatenate([watched.half[i], rows]))
        return replace(watched, variance=torch.from_numpy(variance), half=tuple(half))

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every measured run's metrics given the others, noise included: n x p each.

        Rasmussen & Williams 2006, eq. 5.12.
        """
        n = len(self.Y)
        precision = torch.from_numpy(np.stack([factor.inverse.diagonal()[:n] for factor in self.factors], axis=1))
        alpha = torch.from_numpy(np.stack([alpha[:n] for alpha in self.alpha], axis=1))
        return self.Y - alpha / precision, 1 / precision

    def memory(self) -> dict[str, Any]:
        """The fitted hyperparameters as JSON, for the next fit to start from."""
        return {"metrics": [self.layout.names(row) for row in self.theta.numpy()], "runs": self.runs}


class _Posterior(torch.autograd.Function):
    """`GaussianProcess.posterior` with its gradient, both in closed form."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, gp: GaussianProcess) -> tuple[Tensor, Tensor]:
        ctx.F, ctx.gp = F.detach().numpy(), gp
        mean, variance, ctx.parts = gp.moments(ctx.F)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor, None]:
        gp, found = ctx.gp, np.zeros_like(ctx.F)
        for i, (kernel, (A, slope, half)) in enumerate(zip(gp.kernels, ctx.parts, strict=True)):
            weight = to_variance[i].numpy()
            G = to_mean[i].numpy()[:, None] * gp.alpha[i] - 2 * (weight * gp.factors[i].rest(half)).T  # b x n
            gradient = kernel.gradient(A, gp.bent[i], slope, G)
            if len(kernel.root):
                gradient[:, kernel.first :] += 2 * kernel.linear * weight[:, None] * A[:, kernel.first :]
            found += kernel.unbent(ctx.F, gradient)
        return torch.from_numpy(found), None


def kernels(layout: Layout, theta: Tensor) -> tuple[Kernel, ...]:
    """The kernel of each metric at raw hyperparameters (p x H)."""
    hyper = layout.hyper(theta)
    width = hyper.lengthscale[:, list(layout.groups)].numpy()
    root = layout.centres.pow(1 / 3).numpy()
    numbers = zip(hyper.amplitude.tolist(), hyper.linear.tolist(), hyper.noise.tolist(), strict=True)
    return tuple(Kernel(width[i], *three, float(hyper.power), root) for i, three in enumerate(numbers))


def fit(
    features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None, iterations: int = 60
) -> GaussianProcess:
    """Maximum a posteriori hyperparameters of p processes, by L-BFGS-B from where `sought` has it begin.

    Where there are many runs, and hardly more than `start` was fitted to, its hyperparameters are taken as they are.
    """
    n, p = Y.shape
    layout = Layout.of(features, inputs, across=False)
    F = inputs.F.detach().numpy()
    posterior = LogPosterior(layout, F, Y.numpy())
    known, runs = remembered(layout, p, start)
    if known is not None and SETTLED <= runs <= n < GROWN * runs:
        return GaussianProcess.given(features, layout, torch.from_numpy(known), F, Y, runs)
    found = sought(posterior.loss, layout, p, n, known, runs, iterations)
    return GaussianProcess.given(features, layout, torch.from_numpy(found), F, Y, n)


def remembered(layout: Layout, p: int, start: Mapping[str, Any] | None) -> tuple[Array | None, int]:
    """p x H raw numbers of a memory, None where it is of other metrics, and how many runs they were fitted to."""
    metrics = (start or {}).get("metrics", ())
    if len(metrics) != p:
        return None, 0
    return np.stack([layout.vector(values) for values in metrics]), int((start or {}).get("runs", 0))


def sought(
    loss: Callable[[Array], tuple[float, Array]],
    layout: Layout,
    p: int,
    n: int,
    known: Array | None,
    runs: int,
    iterations: int,
) -> Array:
    """Where minus the log posterior of n runs is least: p x H raw numbers.

    known: where it was for fewer, `runs`. It begins at the best of `known`, the prior's centre, and a noisy version of
    that. Noise can always be explained by short lengthscales, and what was explained so after few runs would stay so:
    the noisy start is gone on from as well at first, and whenever there are RESOUGHT times more runs. NumericalError
    where it ends at something not finite.
    """
    noisy = np.tile(layout.vector({"noise": [math.log(NOISY)]}), p)
    starts = [np.tile(layout.vector(), p), noisy]
    if known is not None:
        starts.append(known.reshape(-1))
    begins = [min(starts, key=lambda raw: loss(raw)[0])]
    anew = not runs or math.floor(math.log(n, RESOUGHT)) != math.floor(math.log(runs, RESOUGHT))
    if anew and begins[0] is not noisy:
        begins.append(noisy)
    options = {"maxiter": iterations, "ftol": 1e-7}
    ends = [
        minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=layout.bounds * p, options=options)
        for begin in begins
    ]
    found: Array = min(ends, key=lambda end: float(end.fun)).x
    if not np.isfinite(found).all():
        raise NumericalError("The fit of the hyperparameters ended at values that are not finite.")
    return found.reshape(p, -1)


@dataclass(frozen=True)
class LogPosterior:
    """The log marginal likelihood plus the log prior of raw hyperparameters, up to a constant. F: n x D. Y: n x p."""

    layout: Layout
    F: Array
    Y: Array

    @cached_property
    def _blocks(self) -> dict[str, slice]:
        """Where the hyperparameters of each kind lie in a vector of H."""
        stops = np.cumsum([block.size for block in self.layout.blocks]).tolist()
        return {b.name: slice(stop - b.size, stop) for b, stop in zip(self.layout.blocks, stops, strict=True)}

    @cached_property
    def _groups(self) -> Array:
        """D x G, one where a feature is of a group."""
        return np.eye(self.layout.G)[list(self.layout.groups)]

    @cached_property
    def _root(self) -> Array:
        return self.layout.centres.pow(1 / 3).numpy()

    def loss(self, raw: Array) -> tuple[float, Array]:
        """Minus the log posterior of p H raw hyperparameters, and its gradient."""
        theta = raw.reshape(self.Y.shape[1], -1)
        gradient, total, to_power = np.zeros_like(theta), 0.0, 0.0
        power = math.exp(theta[:, self._blocks["power"]].mean()) if self.layout.bent else POWER
        for i, row in enumerate(theta):
            value, slope = self._metric(row, power, self.Y[:, i], gradient[i])
            total, to_power = total + value, to_power + slope
        if self.layout.bent:
            gradient[:, self._blocks["power"]] += to_power * power / len(theta)
        value, slopes = self.layout.log_prior_and_gradient(theta)
        return -(total + value), -(gradient + slopes).reshape(-1)

    def _metric(self, row: Array, power: float, y: Array, gradient: Array) -> tuple[float, float]:
        """Log marginal likelihood of one metric, and its derivative by the power; `gradient` (H) is filled in."""
        at = self._blocks
        linear = math.exp(row[at["linear"]][0]) if self.layout.shares else 0.0
        lengthscale = np.exp(row[at["lengthscale"]])
        amplitude, noise = (math.exp(row[at[name]][0]) for name in ("amplitude", "noise"))
        kernel = Kernel(lengthscale[list(self.layout.groups)], amplitude, linear, noise, power, self._root)
        A = kernel.bent(self.F)
        K, slope = kernel.between(A, A)
        shape = K - MEAN_VARIANCE  # the first term, where there is no linear one
        S = A[:, kernel.first :]
        if len(self._root):
            shape -= linear * (S @ S.T)
        K[np.diag_indices_from(K)] += noise
        try:
            factor = Factor.of(K, amplitude)
        except NumericalError:
            return -1e10, 0.0  # a line search turns back from here
        alpha = factor.rest(factor.half(y))
        W = factor.inverse
        W *= -0.5
        W += 0.5 * np.outer(alpha, alpha)  # the derivative by the covariance
        trace = float(W.trace())
        gradient[at["amplitude"]] = (W * shape).sum() + JITTER * amplitude * trace
        gradient[at["noise"]] = noise * trace
        V = W * slope
        rows, VA = V.sum(1), V @ A
        # sum_ij V_ij (a_i - a_j)^2 by feature, and twice its derivative by log l^-1
        spread = 2 * (rows @ np.square(A) - (A * VA).sum(0)) / np.square(kernel.width)
        gradient[at["lengthscale"]] = -2 * spread @ self._groups
        to_power = 0.0
        if len(self._root):
            WS = W @ S
            gradient[at["linear"]] = linear * (S * WS).sum()
            if self.layout.bent:
                first, width = kernel.first, kernel.width[kernel.first :]
                to_shares = 4 * (S * rows[:, None] - VA[:, first:]) / np.square(width) + 2 * linear * WS
                x = self.F[:, first:] / self._root
                grown = np.power(x, 3 * power)
                bending = self._root * (np.log(np.maximum(x, 1e-300)) * grown / power - (grown - 1) / (3 * power**2))
                to_power = float((to_shares * bending).sum())
        return -0.5 * float(y @ alpha) - factor.log_root_determinant, to_power
