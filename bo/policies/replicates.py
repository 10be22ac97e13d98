"""Whether to run a configuration once more instead of a new one.

Under noise a repeat tells which of the leading configurations is best; without noise it tells nothing. Both are worth
what a run is expected to add to the best posterior mean among the configurations run, which is expected improvement
with noise as Frazier, "A Tutorial on Bayesian Optimization", arXiv 1807.02811, section 4.1, has it: it is as good for a
point that was evaluated before. Repeats as a decision of their own: Binois et al. 2019, "Replication or exploration?
Sequential design for stochastic simulation experiments", Technometrics 61(1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bo.acquisition import noisy_ei
from bo.acquisition.acquisition import Situation

#: Leading configurations that may be run again.
LEADERS = 8
#: Share of noise in the variance of results below which training counts as repeatable. A fit to results without noise
#: leaves a hundredth of that.
NOISY = 0.005


def worth_repeating(situation: Situation, candidate: Tensor) -> int | None:
    """Row of `situation.tried` that is worth more to run again than `candidate` (d,) to run; None when there is none.

    Equal rows are runs of one configuration, of which the first is given.
    """
    tried, belief = situation.tried, situation.believed
    if len(tried) < 2:
        return None
    with torch.no_grad():
        mean = belief.mean(tried)
        if belief.noise < NOISY * (mean.var() + belief.noise):
            return None
        leaders = torch.argsort(mean, descending=True, stable=True)[:LEADERS]
        gain = noisy_ei.make_evaluated(situation)(torch.cat([tried[leaders], candidate[None]]))
    best = int(gain[:-1].argmax())
    if not gain[best] > gain[-1]:
        return None
    return int((tried == tried[leaders[best]]).all(-1).nonzero()[0, 0])
