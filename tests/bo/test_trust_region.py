from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import AtMost, Minimize, dataset
from bo.objective import Pareto
from bo.policies.sobol import Sobol
from bo.policies.trust_region import LARGEST, SIDE, TrustRegion, around, confined, fold
from bo.ports import History, Limits, Policy, Proposal
from bo.surrogates import composite
from bo.trial import Trial
from search_spaces import Choice, Integer, Mixture, Real, Schedule, Space

WIDE = Space(**{f"x{i}": Real(0, 1) for i in range(20)})
LINE = Space(x=Real(0, 1), y=Real(0, 1))
RICH = Space(
    lr=Real(1e-4, 1e-1, log=True),
    batch_size=Integer(16, 256, log=True),
    schedule=Schedule("cosine", "linear", warmup=0.02, floor=0.0, wsd={"decay": Real(0.05, 0.3)}),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {}}),
    data=Mixture("code", "docs", "prose", floor=0.02),
)
Measure = Callable[[Mapping[str, Any]], float | None]


def told(history: History, proposal: Proposal, loss: float | None) -> History:
    id = len(history.trials)
    trial = Trial(id, proposal.config, proposal.scale, id, proposal.source, 1.0, predicted=proposal.predicted)
    trial = replace(trial, status="diverged" if loss is None else "finished", metrics=loss and {"loss": loss})
    return replace(history, trials=(*history.trials, trial), memory=proposal.memory, seen=id + 1)


def run(policy: Policy, space: Space, measure: Measure, trials: int, seed: int = 0) -> tuple[History, list[Proposal]]:
    history, proposals = History(space, Minimize("loss"), (), Limits(n_trials=trials)), []
    while found := policy.propose(history, 1, np.random.default_rng([seed, len(history.trials)])):
        assert space.validate(found[0].config) == found[0].config
        proposals.append(found[0])
        history = told(history, found[0], measure(found[0].config))
    return history, proposals


def with_losses(losses: list[float | None]) -> History:
    """A history in a plane whose runs came out like this, one after the other."""
    rng = np.random.default_rng(0)
    history = History(LINE, Minimize("loss"), ())
    for loss in losses:
        history = told(history, Proposal(LINE.sample(rng, 1)[0], LINE.top, "trust_region"), loss)
    return history


def rotated_bowl(config: Mapping[str, Any]) -> float:
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    z = rotation @ (np.array(list(config.values())) - rng.uniform(0.3, 0.7, 20))
    return float(1 + (np.square(z) * np.linspace(1, 10, 20)).sum())


def best(history: History) -> float:
    return min(trial.metrics["loss"] for trial in history.trials if trial.metrics)


def test_in_twenty_rotated_coordinates_it_is_well_ahead_of_random_search_with_half_the_runs() -> None:
    mine, _ = run(TrustRegion(), WIDE, rotated_bowl, 45)
    random, _ = run(Sobol(), WIDE, rotated_bowl, 90)
    assert best(mine) - 1 < 0.65 * (best(random) - 1)
    found = TrustRegion().recommend(mine, WIDE.top, np.random.default_rng(0))
    assert rotated_bowl(found.config) - 1 < 0.65 * (best(random) - 1)
    assert found.low <= found.mean <= found.high


def test_the_box_doubles_after_three_successes_and_halves_when_patience_is_out() -> None:
    start = [5.0, 4.0, 6.0]
    assert fold(with_losses(start), 3, 4).side == SIDE
    assert fold(with_losses([*start, 3.0, 2.0, 1.0]), 3, 4).side == 2 * SIDE
    assert fold(with_losses([*start, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]), 3, 4).side == LARGEST
    assert fold(with_losses([*start, 7.0, None, 7.0]), 3, 4).side == SIDE
    assert fold(with_losses([*start, 7.0, None, 7.0, 7.0]), 3, 4).side == SIDE / 2
    assert fold(with_losses([*start, 7.0, 7.0, 7.0, 3.0, 7.0]), 3, 4).side == SIDE
    assert fold(with_losses([*start, *[4.0 - 1e-6] * 4]), 3, 4).side == SIDE / 2


def test_runs_of_another_study_move_no_box() -> None:
    own = with_losses([5.0, 4.0, 3.0, 2.0])
    theirs = tuple(replace(t, source="prior", study="other") for t in with_losses([1.0, 2.0] * 20).trials)
    both = replace(own, trials=(*theirs, *own.trials))
    (here, beside) = (fold(each, 2, 4) for each in (own, both))
    assert (beside.side, beside.restarts) == (here.side, here.restarts)
    assert beside.members(both, ("finished",)) == 4


def test_a_box_that_has_become_too_small_starts_again_elsewhere_and_says_so() -> None:
    history = with_losses([1.0, 2.0, 3.0, *[5.0] * 14, 4.0])
    policy = TrustRegion(n_init=3, patience=2)
    region = policy.region(history)
    assert (region.restarts, region.first, region.side) == (1, 17, SIDE)
    (again,) = policy.propose(history, 1, np.random.default_rng(0))
    assert again.source == "sobol"
    assert again.note is not None
    assert "restart 1" in again.note
    more = with_losses([1.0, 2.0, 3.0, *[5.0] * 14, 4.0, 4.1, 4.2])
    (onward,) = policy.propose(more, 1, np.random.default_rng(0))
    assert (onward.source, onward.note) == ("trust_region", None)


def test_proposals_are_a_pure_function_of_the_history() -> None:
    history, _ = run(TrustRegion(), LINE, lambda c: (c["x"] - 0.3) ** 2 + (c["y"] - 0.6) ** 2, 12)
    history = replace(history, limits=Limits())
    one, two = (TrustRegion().propose(history, 3, np.random.default_rng(5)) for _ in range(2))
    assert one == two
    assert len({tuple(proposal.config.values()) for proposal in one}) == 3


@pytest.mark.parametrize(
    "measure",
    [lambda c: None, lambda c: None if c["lr"] > 3e-3 else 2 + c["lr"], lambda c: 1.0, lambda c: 1e12 * (2 + c["lr"])],
    ids=["all diverged", "a cliff", "constant", "huge"],
)
def test_choices_mixtures_schedules_and_divergences_are_coped_with(measure: Measure) -> None:
    history, proposals = run(TrustRegion(patience=1), RICH, measure, 16)
    assert len(proposals) == 16
    if any(trial.metrics for trial in history.trials):
        assert any(proposal.source == "trust_region" for proposal in proposals)
    for tried in (False, True):
        found = TrustRegion().recommend(history, RICH.top, np.random.default_rng(0), tried)
        assert RICH.validate(found.config)


def test_several_objectives_are_refused() -> None:
    history = History(LINE, Pareto(Minimize("a"), Minimize("b")), ())
    with pytest.raises(ValueError, match="one best run"):
        TrustRegion().propose(history, 1, np.random.default_rng(0))


def model_of(space: Space, n: int = 24) -> composite.Composite:
    """Fitted to a loss that the first number alone bears on."""
    history = History(space, Minimize("loss"), ())
    for i, config in enumerate(space.sample(np.random.default_rng(0), n)):
        loss = 2 + 3 * float(np.sin(6 * space.encode(config)[0]))
        trial = Trial(i, config, space.top, 0, "sobol", status="finished", metrics={"loss": loss})
        history = replace(history, trials=(*history.trials, trial))
    return composite.fit(dataset.from_history(history))


def test_the_box_is_long_where_lengthscales_are_and_leaves_choices_free() -> None:
    model = model_of(RICH)
    centre = torch.as_tensor(RICH.encode(RICH.decode(np.full(len(RICH.columns), 0.5))))
    box = around(centre, 0.1, model, RICH)
    kinds = [column.kind for column in RICH.columns]
    for i, kind in enumerate(kinds):
        assert (box[1, i] - box[0, i] == 1.0) == (kind == "choice")
    lr, batch = (box[1] - box[0])[:2]
    assert lr < 0.5 * batch


@pytest.mark.parametrize("space", [LINE, WIDE, RICH], ids=["line", "wide", "rich"])
def test_what_is_found_is_the_best_of_the_box_and_new(space: Space) -> None:
    d = len(space.columns)
    free = torch.tensor([column.kind == "real" and not column.schedule for column in space.columns])
    centre = torch.as_tensor(space.encode(space.decode(np.full(d, 0.5))))
    box = torch.stack([torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)])
    box[0, free], box[1, free] = 0.4, 0.55

    def up(X: Tensor) -> Tensor:
        return X[:, free].sum(-1)

    found = confined(up, space, centre, box, centre[None], np.random.default_rng(0))
    assert found.new
    active = torch.as_tensor(space.active(found.x[None].numpy())[0])
    torch.testing.assert_close(found.x[free & active], torch.full_like(found.x[free & active], 0.55), atol=1e-6, rtol=0)


def test_predicates_hold_in_the_box() -> None:
    space = Space(x=Real(0, 1), y=Real(0, 1), constraints=[lambda c: c["x"] + c["y"] < 1.0])
    _, proposals = run(TrustRegion(), space, lambda c: 3 - c["x"] - c["y"] + (c["x"] - 0.4) ** 2, 14)
    assert all(p.config["x"] + p.config["y"] < 1.0 for p in proposals)
    assert max(p.config["x"] + p.config["y"] for p in proposals) > 0.95


@pytest.mark.parametrize("settings", [{"n_init": 0}, {"patience": 0}, {"patience": 2.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        TrustRegion(**settings)


def test_limits_on_metrics_hold_for_proposals_and_for_the_recommendation() -> None:
    """The loss falls towards a corner that needs too much memory."""
    objective = Minimize("loss", subject_to=[AtMost("memory", 10.0)])

    def measure(config: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": 2 - config["x"] - config["y"], "memory": 10 * (config["x"] + config["y"])}

    rng = np.random.default_rng(0)
    trials = tuple(
        Trial(i, config, LINE.top, i, "sobol", 1.0, "finished", metrics=measure(config))
        for i, config in enumerate(LINE.sample(rng, 24))
    )
    history = History(LINE, objective, trials)
    proposals = TrustRegion().propose(history, 4, rng)
    assert all(proposal.source == "trust_region" for proposal in proposals)
    assert max(measure(proposal.config)["memory"] for proposal in proposals) < 11
    found = TrustRegion().recommend(history, LINE.top, rng)
    assert 9 < measure(found.config)["memory"] < 10.2
    assert "keeps the limits" in (found.note or "")


def test_it_keeps_away_from_where_runs_diverge() -> None:
    rng = np.random.default_rng(2)
    history = History(LINE, Minimize("loss"), ())
    for config in LINE.sample(rng, 16):
        loss = None if config["x"] > 0.6 else 2 - config["x"] + (config["y"] - 0.5) ** 2
        history = told(history, Proposal(config, LINE.top, "trust_region"), loss)
    proposals = TrustRegion().propose(history, 4, rng)
    assert max(proposal.config["x"] for proposal in proposals) < 0.6
    assert TrustRegion().recommend(history, LINE.top, rng).config["x"] < 0.6
