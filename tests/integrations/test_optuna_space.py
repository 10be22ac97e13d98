import logging
import re

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from integrations.foreign_space import LARGEST_GRID
from integrations.optuna_space import distributions_of, from_optuna
from search_spaces import Choice, Fidelity, Integer, Real, Space
from search_spaces.parameter import Fixed

OTHER = {"other": FloatDistribution(0, 1)}


def entry(distribution):
    """What one distribution becomes."""
    return from_optuna({"x": distribution, **OTHER}).parameters["x"]


def study_of(suggest, n, sampler=None):
    """A study of `n` trials that ask for what `suggest` asks for."""
    logging.getLogger("optuna").setLevel(logging.WARNING)

    def objective(trial):
        suggest(trial)
        return 0.0

    study = optuna.create_study(sampler=sampler or optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=n)
    return study


@pytest.mark.parametrize(
    ("distribution", "parameter"),
    [
        (FloatDistribution(-1, 2), Real(-1, 2)),
        (FloatDistribution(1e-4, 1e-1, log=True), Real(1e-4, 1e-1, log=True)),
        (FloatDistribution(0.5, 0.5), Fixed(0.5)),
        (FloatDistribution(0, 1, step=0.25), Choice(0.0, 0.25, 0.5, 0.75, 1.0, ordered=True)),
        (FloatDistribution(0.1, 0.1, step=0.25), Fixed(0.1)),
        (IntDistribution(3, 9), Integer(3, 9)),
        (IntDistribution(16, 256, log=True), Integer(16, 256, log=True)),
        (IntDistribution(3, 3), Fixed(3)),
        (IntDistribution(3, 9, step=3), Choice(3, 6, 9, ordered=True)),
        (CategoricalDistribution([None, True, 1, 1.0, "a"]), Choice(None, True, 1, 1.0, "a")),
        (CategoricalDistribution([np.float64(0.5), 2]), Choice(0.5, 2)),
        (CategoricalDistribution(["a"]), Fixed("a")),
    ],
)
def test_a_distribution_becomes_the_parameter_with_the_same_range(distribution, parameter):
    assert entry(distribution) == parameter


def floats(low=-100.0):
    return st.floats(low, 100.0, width=32)


ranges = st.one_of(
    st.tuples(floats(), floats()).map(sorted).map(lambda b: FloatDistribution(*b)),
    st.tuples(floats(0.125), floats(0.125)).map(sorted).map(lambda b: FloatDistribution(*b, log=True)),
    # A whole number of steps, else Optuna warns that it lowers the upper end.
    st.builds(
        lambda low, step, n: FloatDistribution(low / 10, (low + n * step) / 10, step=step / 10),
        st.integers(-50, 50),
        st.integers(1, 20),
        st.integers(0, 40),
    ),
    st.tuples(st.integers(-99, 99), st.integers(-99, 99)).map(sorted).map(lambda b: IntDistribution(*b)),
    st.tuples(st.integers(1, 99), st.integers(1, 99)).map(sorted).map(lambda b: IntDistribution(*b, log=True)),
    st.builds(
        lambda low, step, n: IntDistribution(low, low + n * step, step=step),
        st.integers(-50, 50),
        st.integers(1, 20),
        st.integers(0, 40),
    ),
    st.lists(st.integers(-9, 9) | st.text(max_size=3), min_size=1, max_size=5, unique=True).map(
        CategoricalDistribution
    ),
)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=3), ranges, max_size=4), st.integers(0, 2**31))
def test_what_the_space_samples_is_in_the_distributions_and_the_other_way_round(distributions, seed):
    distributions = {**distributions, **OTHER}
    space = from_optuna(distributions)
    assert list(space.parameters) == list(distributions)
    for config in space.sample(np.random.default_rng(seed), 5):
        for name, distribution in distributions.items():
            assert distribution._contains(distribution.to_internal_repr(config[name]))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(3):
        space.validate(study.ask(distributions).params)


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_a_study_gives_the_space_of_its_trials_and_its_trials_are_configs_of_that(sampler):
    def suggest(trial):
        trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        trial.suggest_float("dropout", 0, 0.7, step=0.1)
        trial.suggest_int("width", 64, 512, step=64)
        trial.suggest_categorical("act", ["relu", "gelu"])

    study = study_of(suggest, 20, sampler(seed=0))
    space = from_optuna(study)
    assert space == from_optuna(study.trials)
    assert space == from_optuna(distributions_of(study))
    assert list(space.parameters) == ["lr", "dropout", "width", "act"]
    for trial in study.trials:
        assert space.validate(trial.params) == trial.params


def test_trials_that_did_not_get_to_the_end_may_lack_parameters():
    study = study_of(lambda trial: (trial.suggest_float("a", 0, 1), trial.suggest_float("b", 0, 1)), 2)
    study.ask().suggest_float("a", 0, 1)
    assert from_optuna(study) == Space(a=Real(0, 1), b=Real(0, 1))


def test_a_parameter_that_some_trials_lack_is_refused_unless_it_is_asked_for():
    def suggest(trial):
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            trial.suggest_float("alpha", 0, 1)

    study = study_of(suggest, 10)
    message = r"^alpha is in \d of 10 complete trials, so it may depend on others; write a Choice of sub-spaces, or"
    with pytest.raises(ValueError, match=message):
        from_optuna(study)
    assert from_optuna(distributions_of(study)) == Space(kind=Choice("a", "b"), alpha=Real(0, 1))


def test_a_parameter_whose_distribution_changed_is_refused():
    study = study_of(lambda trial: trial.suggest_float("x", 0, 1 + trial.number), 2)
    message = (
        "x has two distributions in these trials, FloatDistribution(high=1.0, log=False, low=0.0, step=None) and "
        "FloatDistribution(high=2.0, log=False, low=0.0, step=None); pass a dictionary with the one to search."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_optuna(study)


def test_constraints_and_a_fidelity_can_be_added():
    fidelity = Fidelity(params=(1, 2), tokens=(1, 2), target={"params": 2, "tokens": 2})
    space = from_optuna(OTHER, constraints=["other <= 0.5"], fidelity=fidelity)
    assert space == Space(other=Real(0, 1), constraints=["other <= 0.5"], fidelity=fidelity)


class Custom(BaseDistribution):
    def to_internal_repr(self, value):
        return value

    def single(self):
        return False

    def _contains(self, value):
        return True


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FloatDistribution(0, float("inf")),
            "x cannot be taken over: Real needs finite numbers as bounds, got high=inf.",
        ),
        (
            lambda: FloatDistribution(0, 1, step=0.001),
            f"x has 1001 steps and only {LARGEST_GRID} can be options; make it a range without steps and round in the "
            "training function.",
        ),
        (lambda: IntDistribution(0, 10**6, step=10), "x has 100001 steps and only"),
        (
            lambda: CategoricalDistribution([(64,), (64, 64)]),
            "x has the option (64,), which is no text, finite number, bool or None; name the options by texts",
        ),
        (lambda: CategoricalDistribution([1, float("nan")]), "x has the option nan, which is no text"),
        (
            lambda: CategoricalDistribution([1, 1]),
            "x cannot be taken over: Choice has the option 1 twice; each may be there once.",
        ),
        (
            Custom,
            "x must be a FloatDistribution, IntDistribution or CategoricalDistribution of Optuna, got Custom().",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        entry(make())


def test_names_that_are_arguments_of_a_space_and_empty_studies_are_refused():
    message = "'constraints' is an argument of Space and cannot name a parameter; rename it."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_optuna({"constraints": FloatDistribution(0, 1)})
    with pytest.raises(
        ValueError, match=r"^These trials have no parameters; pass the distributions as a dictionary\.$"
    ):
        from_optuna([])
