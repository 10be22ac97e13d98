"""Rates that hold across widths: the table of the paper, and that training moves every layer alike at every width."""

import pytest
import torch
from torch import nn

from experiments.transformer import Transformer
from integrations.optimizers import OPTIMIZERS, make_optimizer
from integrations.width_transfer import RULES, Growth, coordinate_check, growth, rescale_init, width_groups


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        return self.out(x)


WIDTHS = (256, 512, 1024)
LAYERS = ("first", "second", "third", "out")


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: more threads only wait for each other where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slopes(name, lr, transfer):
    """The coordinate check of the MLP in muP, or as torch makes it with one rate for all."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 4, (32,), generator=generator)
    base = MLP(WIDTHS[0])

    def make_model(width):
        model = MLP(width)
        if transfer:
            rescale_init(model, base)
        return model

    def optimizer_of(model):
        return make_optimizer(name, width_groups(model, base, name, lr) if transfer else model.parameters(), lr)

    return coordinate_check(
        make_model, optimizer_of, WIDTHS, x, lambda output: nn.functional.cross_entropy(output, y), seeds=range(8)
    )


@pytest.mark.parametrize(("name", "lr"), [("adamw", 0.003), ("sgd", 0.3), ("lion", 0.001)])
def test_with_width_groups_updates_do_not_depend_on_the_width(name, lr):
    found = slopes(name, lr, transfer=True)
    assert set(found) == set(LAYERS)
    assert all(abs(slope) < 0.05 for slope in found.values()), found


def test_without_them_updates_grow_with_the_width():
    adam = slopes("adamw", 0.003, transfer=False)
    assert all(adam[layer] > 0.5 for layer in ("second", "third", "out")), adam
    sgd = slopes("sgd", 0.3, transfer=False)
    assert sgd["out"] > 0.5, sgd
    assert sgd["first"] < -0.2, sgd


def test_the_check_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    coordinate_check(
        MLP, lambda m: torch.optim.SGD(m.parameters(), 0.1), (8, 16), torch.ones(2, 16), lambda y: y.square().sum()
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "first", "first_bias", "hidden", "out", "out_bias"),
    [("adamw", 1, 1, 1 / 4, 1 / 4, 1), ("sgd", 4, 4, 1, 1 / 4, 1)],
)
def test_rates_are_those_of_the_papers_table(name, first, first_bias, hidden, out, out_bias):
    model, base = MLP(32), MLP(8)
    groups = width_groups(model, base, name, 0.1)
    rates = {id(parameter): group["lr"] / 0.1 for group in groups for parameter in group["params"]}
    assert len(rates) == 8
    found = {parameter_name: rates[id(parameter)] for parameter_name, parameter in model.named_parameters()}
    assert found == pytest.approx(
        {
            "first.weight": first,
            "first.bias": first_bias,
            "second.weight": hidden,
            "second.bias": first_bias,
            "third.weight": hidden,
            "third.bias": first_bias,
            "out.weight": out,
            "out.bias": out_bias,
        }
    )


def test_at_the_base_width_nothing_changes():
    model, base = MLP(8), MLP(8)
    weights = [parameter.clone() for parameter in model.parameters()]
    rescale_init(model, base)
    assert all(map(torch.equal, model.parameters(), weights))
    for name in RULES:
        assert {group["lr"] for group in width_groups(model, base, name, 0.1)} == {0.1}


def test_weight_decay_takes_the_same_off_every_weight_in_a_step():
    for name in RULES:
        groups = width_groups(MLP(32), MLP(8), name, 0.1, weight_decay=0.3)
        assert [group["lr"] * group["weight_decay"] for group in groups] == pytest.approx([0.03] * len(groups))


def test_groups_tell_their_role():
    roles = {group["role"]: len(group["params"]) for group in width_groups(MLP(32), MLP(8), "adamw", 0.1)}
    assert roles == {"input": 1, "vector": 4, "hidden": 2, "output": 1}


@pytest.mark.parametrize("by_fan_in", [True, False])
def test_initial_scales_are_those_of_the_papers_table(by_fan_in):
    """Standard deviations fall as 1, 1 / sqrt(width) and 1 / width, whichever way the model's own ones do."""
    model, base = MLP(1024), MLP(64)
    if not by_fan_in:
        for network in (model, base):
            for parameter in network.parameters():
                nn.init.normal_(parameter, std=0.02)
    own_bias = model.first.bias.clone()
    rescale_init(model, base, by_fan_in=by_fan_in)

    def ratio(layer):
        return (getattr(model, layer).weight.std() / getattr(base, layer).weight.std()).item()

    assert ratio("first") == pytest.approx(1, rel=0.1)
    assert ratio("second") == pytest.approx(16**-0.5, rel=0.1)
    assert ratio("out") == pytest.approx(1 / 16, rel=0.15)
    assert torch.equal(model.first.bias, own_bias)


def test_a_transformer_is_classified_whole():
    grown = growth(Transformer(64, 2, 4, 16, seed=0), Transformer(16, 2, 2, 16, seed=0))
    assert grown["embedding.weight"] == Growth(1.0, 4.0, "input")
    assert grown["logits.weight"] == Growth(4.0, 1.0, "output")
    assert grown["norm.weight"] == Growth(1.0, 4.0, "vector")
    for name in ("attention.qkv", "attention.out", "up", "down"):
        assert grown[f"blocks.1.{name}.weight"] == Growth(4.0, 4.0, "hidden")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda width: nn.Conv2d(3, width, 3), Growth(1.0, 2.0, "input")),
        (lambda width: nn.ConvTranspose2d(width, 3, 3), Growth(2.0, 1.0, "output")),
        (lambda width: nn.Conv1d(width, width, 3, groups=width), Growth(1.0, 2.0, "input")),
        (lambda width: nn.Linear(width, width**2), Growth(2.0, 4.0, "hidden")),
        (lambda width: nn.Embedding(10, width), Growth(1.0, 2.0, "input")),
    ],
)
def test_modules_say_which_dimension_is_which(make, expected):
    assert growth(make(8), make(4))["weight"] == expected


class Own(nn.Module):
    def __init__(self, width, *shape):
        super().__init__()
        self.table = nn.Parameter(torch.ones(shape or (1, 10, width)))


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.logits = nn.Linear(width, 10, bias=False)
        self.logits.weight = self.embedding.weight


def test_a_parameter_of_an_own_module_needs_a_role():
    with pytest.raises(ValueError, match=r"'table' of an own module grows in dimension \[2\].*roles="):
        growth(Own(8), Own(4))
    assert growth(Own(8), Own(4), {"table": "input"})["table"] == Growth(1.0, 2.0, "input")
    assert growth(Own(8), Own(4), {"table": "output"})["table"] == Growth(2.0, 1.0, "output")
    assert growth(Own(8, 8, 8), Own(4, 4, 4))["table"] == Growth(2.0, 2.0, "hidden")


def test_tied_weights_are_refused_until_their_role_is_given():
    with pytest.raises(ValueError, match="tied between an input and an output"):
        growth(Tied(8), Tied(4))
    assert growth(Tied(8), Tied(4), {"embedding.weight": "input"})["embedding.weight"] == Growth(1.0, 2.0, "input")


def test_models_that_differ_in_more_than_width_are_refused():
    with pytest.raises(ValueError, match=r"'0.bias' is not a parameter of both models"):
        growth(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(4, 4, bias=False)))
    with pytest.raises(ValueError, match=r"shape \(8, 8\) and in the base model \(2, 2, 2\)"):
        growth(Own(8, 8, 8), Own(4, 2, 2, 2))
    with pytest.raises(ValueError, match="grows in 3 dimensions"):
        growth(Own(8, 4, 4, 4), Own(4, 2, 2, 2))
    with pytest.raises(ValueError, match="'tabel' is not a parameter of both models, did you mean 'table'"):
        growth(Own(8), Own(4), {"tabel": "input"})
    with pytest.raises(ValueError, match="must be 'input' or 'output', got 'hidden'"):
        growth(Own(8), Own(4), {"table": "hidden"})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_width_rule_or_is_refused(name):
    model, base = MLP(8), MLP(4)
    if name == "sgd_sai":
        with pytest.raises(ValueError, match="no width rule for the optimizer 'sgd_sai'"):
            width_groups(model, base, name, 0.1)
    else:
        make_optimizer(name, width_groups(model, base, name, 0.1), 0.1)


def test_a_check_of_a_model_with_dropout_is_refused():
    """Masks that differ hide how the updates grow: every slope comes out near 0."""

    def make_model(width):
        return nn.Sequential(nn.Linear(16, width), nn.Dropout(0.1), nn.Linear(width, 4))

    def check(make):
        return coordinate_check(
            make, lambda m: torch.optim.Adam(m.parameters(), 1e-4), (8, 16), torch.ones(2, 16), lambda y: y.sum(), 1
        )

    with pytest.raises(ValueError, match=r"Layer '2' gives other outputs for the same inputs.*make the model without"):
        check(make_model)
    assert check(lambda width: make_model(width).eval()).keys() == {"0", "2"}


def test_a_check_that_can_have_no_slope_is_refused():
    def check(widths=(8, 16), lr=0.1):
        return coordinate_check(
            MLP, lambda m: torch.optim.SGD(m.parameters(), lr), widths, torch.ones(2, 16), lambda y: y.square().sum()
        )

    with pytest.raises(ValueError, match="needs two widths"):
        check(widths=(8, 8))
    with pytest.raises(ValueError, match="Layer 'first' at width 8 changed by"):
        check(lr=0.0)
