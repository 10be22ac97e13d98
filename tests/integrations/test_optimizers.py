"""What every optimizer that a Choice can name promises, and that each is the one its paper describes."""

import sys

import pytest
import torch
from torch import nn

from bo import checkpoint
from integrations.optimizers import OPTIMIZERS, make_optimizer
from search_spaces import Choice, Real, Space

RATES = {"adamw": 0.03, "sgd": 0.1, "lion": 0.01, "adamp": 0.03, "sgd_sai": 0.1}


class Problem:
    """A small regression with matrices and vectors."""

    def __init__(self, name, **settings):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 5, generator=generator)
        self.y = torch.sin(self.x @ torch.randn(5, 1, generator=generator))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = make_optimizer(name, self.model.parameters(), RATES[name], **settings)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            loss = (self.model(self.x) - self.y).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.fixture
def step():
    """Takes one step from given weights and gradients, 2 x 2, and gives the new weights."""

    def take(name, weights, *gradients, **settings):
        parameter = nn.Parameter(torch.tensor(weights))
        optimizer = make_optimizer(name, [parameter], **settings)
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        return parameter.detach()

    return take


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name):
    losses = Problem(name).train(150)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    problem = Problem(name, weight_decay=0.05)
    problem.train(7)
    checkpoint.save(tmp_path, [problem.model.state_dict(), problem.optimizer.state_dict()])
    expected = problem.train(9)

    again = Problem(name, weight_decay=0.05)
    weights, state = checkpoint.load(tmp_path)
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(state)

    assert again.train(9) == expected
    for ours, theirs in zip(again.model.parameters(), problem.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_groups_with_rates_of_their_own(name):
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer(name, [{"params": [first], "lr": 0.0}, {"params": [second], "role": "own"}], 0.1)
    first.grad = second.grad = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    optimizer.step()
    assert torch.equal(first, torch.ones(2, 2))
    assert not torch.equal(second, torch.ones(2, 2))
    assert optimizer.param_groups[1]["role"] == "own"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"sgd"}))
def test_weight_decay_is_decoupled_but_for_sgd(name, step):
    weights, gradient = [[1.0, -2.0], [4.0, 0.5]], [[0.3, 0.2], [-0.1, 0.4]]
    plain = step(name, weights, gradient, lr=0.1, weight_decay=0.0)
    decayed = step(name, weights, gradient, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(decayed, plain - 0.1 * 0.5 * torch.tensor(weights))


def test_adamp_scales_weight_decay_where_it_projects(step):
    """A gradient orthogonal to the weights means that their scale does not matter: wd_ratio 0.1, no radial part."""
    weights, gradient = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    decayed = step("adamp", weights, gradient, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(decayed, torch.tensor([[1.0 - 0.1 * 0.5 * 0.1, -0.1], [-0.1, 1.0 - 0.1 * 0.5 * 0.1]]))


def test_lion_steps_by_the_sign_of_its_interpolated_momentum(step):
    """c = b1 m + (1 - b1) g, m <- b2 m + (1 - b2) g with b = (0.9, 0.99): m = 0.01 after the first gradient of 1."""
    after = step("lion", [[0.0, 0.0]], [[1.0, 1.0]], [[-0.08, -0.1]], lr=0.1)
    torch.testing.assert_close(after, torch.tensor([[-0.2, 0.0]]))  # 0.009 - 0.008 > 0, and 0.009 - 0.01 < 0


def test_sgd_sai_scales_by_the_first_gradient_alone(step):
    first, second = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    scale = first.norm() / first.std()
    momentum = 0.1 * first
    expected = -0.1 * scale * momentum
    expected -= 0.1 * scale * (0.9 * momentum + 0.1 * second)
    weights = [[0.0, 0.0], [0.0, 0.0]]
    after = step("sgd_sai", weights, first.tolist(), second.tolist(), lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(after, expected)


def test_settings_left_out_are_those_of_the_papers():
    parameter = [nn.Parameter(torch.ones(2, 2))]

    def defaults(name, *keys):
        group = make_optimizer(name, parameter, 0.1).param_groups[0]
        return [group[key] for key in keys]

    assert defaults("adamw", "betas", "eps", "weight_decay") == [(0.9, 0.999), 1e-8, 0.01]
    assert defaults("sgd", "momentum", "weight_decay") == [0, 0]
    assert defaults("lion", "betas", "weight_decay", "weight_decouple") == [(0.9, 0.99), 0.0, True]
    assert defaults("adamp", "betas", "eps", "weight_decay", "delta", "wd_ratio", "weight_decouple") == [
        (0.9, 0.999),
        1e-8,
        0.0,
        0.1,
        0.1,
        True,
    ]
    assert defaults("sgd_sai", "momentum", "weight_decay", "weight_decouple") == [0.9, 0.01, True]


def test_betas_may_be_given_one_by_one():
    parameter = [nn.Parameter(torch.ones(2))]
    assert make_optimizer("adamw", parameter, 0.1, beta2=0.95).param_groups[0]["betas"] == (0.9, 0.95)
    assert make_optimizer("lion", parameter, 0.1, beta1=0.8).param_groups[0]["betas"] == (0.8, 0.99)
    with pytest.raises(ValueError, match="got betas beside beta1 or beta2"):
        make_optimizer("lion", parameter, 0.1, beta1=0.8, betas=(0.9, 0.99))


def test_a_choice_names_them_with_settings_of_their_own():
    space = Space(
        optimizer=Choice(
            {
                "adamw": {"lr": Real(1e-4, 1e-2, log=True), "beta2": Real(0.9, 0.999)},
                "lion": {"lr": Real(2e-5, 2e-3, log=True)},
            }
        )
    )
    config = space.from_json({"optimizer": "adamw", "lr": 0.001, "beta2": 0.95})
    settings = {key: value for key, value in config.items() if key != "optimizer"}
    made = make_optimizer(config["optimizer"], [nn.Parameter(torch.ones(2))], **settings)
    assert isinstance(made, torch.optim.AdamW)
    assert made.param_groups[0]["betas"] == (0.9, 0.95)


def test_an_unknown_name_or_setting_is_refused_with_the_nearest_one():
    parameter = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="no optimizer 'adamW'; did you mean 'adamw'"):
        make_optimizer("adamW", parameter, 0.1)
    with pytest.raises(ValueError, match=r"no optimizer 'xyz'; there are \['adamw', "):
        make_optimizer("xyz", parameter, 0.1)
    with pytest.raises(ValueError, match="'lion' has no setting 'weight_dcay'; did you mean 'weight_decay'"):
        make_optimizer("lion", parameter, 0.1, weight_dcay=0.1)
    with pytest.raises(ValueError, match="'sgd' has no setting 'beta1'; it has"):
        make_optimizer("sgd", parameter, 0.1, beta1=0.9)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"'lion' comes from the package pytorch_optimizer.*'windtunnel\[training\]'"):
        make_optimizer("lion", [nn.Parameter(torch.ones(2))], 0.1)
