"""What every model of the metrics can do, whatever it is inside, and which there are.

A surrogate is p processes over the inputs that `Features` makes, in the model units of `Dataset.Y`: standardised,
larger is better. What it says is about the noise-free metrics, unless a method says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bo import ports
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import EXACT


class Surrogate(Protocol):
    """The posterior of p metrics given n runs."""

    @property
    def features(self) -> Features:
        """What makes its inputs of encoded points."""

    @property
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures, shape (p,)."""

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each, differentiable in `at.F`."""

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each, all of one scale.

        `at` has the b q points, group after group. Differentiable in `at.F`.
        """

    def covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """Posterior covariance between b and k points: p x b x k, differentiable in `at.F`."""

    def believe(self, at: Inputs) -> Surrogate:
        """Conditioned on its own posterior mean at r points: there the variance shrinks, no mean changes."""

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every run's metrics given the others, noise included: n x p each."""

    def memory(self) -> dict[str, Any]:
        """What the next fit starts from, as JSON."""


class Fit(Protocol):
    """How a surrogate is made; every file here has one, called `fit`."""

    def __call__(
        self, features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None
    ) -> Surrogate:
        """Y: n x p. start: what `memory` of an earlier fit returned, for a warm start; what does not fit is ignored.

        NumericalError when nothing could be fitted.
        """


#: Every model of the metrics that a study can name. "gp" is the usual one; over several scales it is "scale_shift", for
#: very many runs "inducing".
SURROGATES: dict[str, str] = {
    "gp": "bo.surrogates.gp:fit",
    "gp_averaged": "bo.surrogates.averaged:fit",
    "scale_shift": "bo.surrogates.scale_shift:fit",
    "multi_task": "bo.surrogates.multi_task:fit",
    "autoregressive": "bo.surrogates.autoregressive:fit",
    "nonlinear_autoregressive": "bo.surrogates.nonlinear_autoregressive:fit",
    "ranking_ensemble": "bo.surrogates.ranking_ensemble:fit",
    "product": "bo.surrogates.product:fit",
    "joint_input": "bo.surrogates.joint_input:fit",
    "linear_truncated": "bo.surrogates.linear_truncated:fit",
    "down_sampling": "bo.surrogates.down_sampling:fit",
    "saas": "bo.surrogates.sparse_axes:fit",
    "inducing": "bo.surrogates.inducing:fit",
    "deep_kernel": "bo.surrogates.deep_kernel:fit",
    "infinite_network": "bo.surrogates.infinite_network:fit",
    "deep_ensemble": "bo.surrogates.deep_ensemble:fit",
    "hamiltonian_network": "bo.surrogates.hamiltonian_network:fit",
    "random_forest": "bo.surrogates.random_forest:fit",
}
#: Those whose optimum drifts with scale, over several of which they come down to "scale_shift": a law counts in these
#: alone.
DRIFTING = ("gp", "gp_averaged", "scale_shift", "saas", "inducing")


def fit(name: str, features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """The surrogate of that name, which is one of SURROGATES; the usual one by the form that the data ask for."""
    if name == "gp" and len(Y) > EXACT:
        name = "inducing"
    elif name == "gp" and inputs.across:
        name = "scale_shift"
    make: Fit = ports.load(SURROGATES, name, "surrogate")
    return make(features, inputs, Y, start)
