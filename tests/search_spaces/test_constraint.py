import math
import pickle

import numpy as np
import pytest

from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Space, space_from_json, space_to_json
from search_spaces.constraint import Inequality


def rng():
    return np.random.default_rng(0)


def cube(n, space):
    x = rng().random((n, len(space.columns)))
    x[:2] = [[0.0], [1.0]]
    return x


def fits(config):
    return config["width"] * config["depth"] % 2 == 0


def impossible(config):
    return config["width"] > 1e9


def broken(config):
    return config["nothing"]


def vague(config):
    return config["width"]


@pytest.mark.parametrize(
    "constraints",
    [
        ["batch * accumulation <= 512"],
        ["batch * accumulation <= 512", "batch * accumulation >= 500"],
        ["lr <= 0.1 * batch ** 0.5 / 16"],
        ["first + 2 * second <= 1", "first - second >= 0.1"],
        ["-first + 1 / 2 >= second / (1 + lr)"],
        ["first + second <= 1e-4"],
        ["rounds * batch <= 40"],
    ],
)
def test_every_point_of_the_cube_and_every_sample_satisfies_the_inequalities_exactly(constraints):
    space = Space(
        batch=Integer(1, 256, log=True),
        accumulation=Integer(1, 64),
        lr=Real(1e-5, 1e-1, log=True),
        first=Real(0, 1),
        second=Real(0, 1),
        rounds=Choice(1, 2, 4, 8, ordered=True),
        other=Mixture("a", "b"),
        constraints=constraints,
    )
    for config in [*space.decode_all(cube(300, space)), *space.sample(rng(), 200)]:
        for text in constraints:
            assert eval(text, {}, dict(config)), (text, config)


def test_an_allowed_config_is_encoded_and_decoded_as_if_there_were_no_constraint():
    free = {"batch": Integer(1, 64, log=True), "accumulation": Integer(1, 64), "a": Real(0, 1), "b": Real(0.001, 1)}
    space, plain = Space(**free, constraints=["batch * accumulation <= 64", "a + b <= 1"]), Space(**free)
    for config in [*space.sample(rng(), 300), {"batch": 8, "accumulation": 8, "a": 0.7, "b": 0.3}]:
        assert space.encode(config).tolist() == plain.encode(config).tolist()
        again = space.decode(space.encode(config))
        assert (again["batch"], again["accumulation"]) == (config["batch"], config["accumulation"])
        assert math.isclose(again["a"], config["a"], rel_tol=1e-12, abs_tol=1e-15)
        assert math.isclose(again["b"], config["b"], rel_tol=1e-12)


def test_samples_of_a_wide_set_are_those_of_the_cube_that_are_allowed():
    space = Space(a=Real(0, 1), b=Real(0, 1), constraints=["a + b <= 1"])
    a = np.array([config["a"] for config in space.sample(rng(), 20000)])
    # Uniform on the triangle: the density of a is 2 (1 - a), so its distribution function is a (2 - a).
    assert np.abs(np.quantile(a, [0.1, 0.5, 0.9]) - (1 - np.sqrt([0.9, 0.5, 0.1]))).max() < 0.01


def test_samples_of_a_set_too_thin_to_hit_are_uniform_over_it():
    names = [f"x{i}" for i in range(8)]
    space = Space(**{name: Real(0, 1) for name in names}, constraints=[f"{' + '.join(names)} <= 1"])
    x = np.array([list(config.values()) for config in space.sample(rng(), 640)])  # one in 40320 of the cube
    # Dirichlet(1, ..., 1) with the slack as its ninth share: mean 1/9, standard deviation sqrt(8/9/9/10).
    assert np.abs(x.mean(axis=0) - 1 / 9).max() < 0.03
    assert np.abs(x.std(axis=0) - math.sqrt(8 / 810)).max() < 0.03


def test_points_of_a_stream_have_their_own_numbers():
    def stream(first, n):
        return np.random.default_rng(0).random((first + n, 4))[first:]

    wide = ["a + b <= 1"]
    thin = ["a + b + c + d <= 0.05"]
    for constraints in (wide, thin):
        space = Space(a=Real(0, 1), b=Real(0, 1), c=Real(0, 1), d=Real(0, 1), constraints=constraints)
        together = space.draw(stream, 0, 150)
        apart = np.concatenate([space.draw(stream, 0, 1), space.draw(stream, 1, 99), space.draw(stream, 100, 50)])
        assert together.tolist() == apart.tolist()


def test_a_constraint_says_nothing_about_options_not_chosen():
    space = Space(
        optimizer=Choice({"adamw": {"lr": Real(0, 1), "beta": Real(0, 1)}, "sgd": {"lr": Real(0, 1)}}),
        wd=Real(0, 1),
        constraints=["lr + wd <= 1", "beta <= lr"],
    )
    configs = space.decode_all(cube(500, space))
    assert all(config["lr"] + config["wd"] <= 1 for config in configs)
    assert all(config["beta"] <= config["lr"] for config in configs if config["optimizer"] == "adamw")
    assert {config["optimizer"] for config in configs} == {"adamw", "sgd"}


def test_repair_is_the_identity_inside_and_continuous_across_the_border():
    space = Space(a=Real(0, 1), b=Integer(1, 100), c=Real(0, 1), constraints=["a * b <= 20"])
    assert space.repaired == (0, 1)
    x = cube(400, space)
    moved = space.repair(x)
    assert np.abs(space.repair(moved) - moved).max() < 1e-12
    # Integers move before they are rounded, so the border is crossed at what b would be.
    inside = x[:, 0] * (0.5 + 100 * x[:, 1]) <= 20
    assert inside.sum() > 50
    assert (~inside).sum() > 50
    assert (moved[inside] == x[inside]).all()
    assert (moved[:, 2] == x[:, 2]).all()
    step = 1e-7 * rng().standard_normal(x.shape)
    assert np.abs(space.repair(np.clip(x + step, 0, 1)) - moved).max() < 1e-5


def test_inequalities_may_speak_of_the_scale():
    fidelity = Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e8), target={"params": 1e6, "tokens": 1e8})
    space = Space(batch=Integer(1, 4096, log=True), constraints=["batch * 1e5 <= tokens"], fidelity=fidelity)
    small, large = ({"params": 1e5, "tokens": 1e6}, {"params": 1e6, "tokens": 1e8})
    assert max(config["batch"] for config in space.at(small).sample(rng(), 200)) == 10
    assert max(config["batch"] for config in space.at(large).sample(rng(), 200)) > 500
    assert space.at(small).columns == space.columns
    assert space.validate({"batch": 4096}) == {"batch": 4096}
    with pytest.raises(ValueError, match=r"batch \* 100000.0 <= tokens at batch=11, tokens=1000000"):
        space.at(small).validate({"batch": 11})
    with pytest.raises(ValueError, match="No config was found"):
        Space(batch=Integer(64, 4096), constraints=["batch * 1e5 <= tokens"], fidelity=fidelity)


def test_predicates_hold_for_samples_and_are_refused_by_name_elsewhere():
    space = Space(width=Integer(1, 9), depth=Integer(1, 9), constraints=[fits])
    assert all(fits(config) for config in space.sample(rng(), 100))
    assert space.satisfies([{"width": 1, "depth": 1}, {"width": 2, "depth": 1}]).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"breaks the constraint .*:fits"):
        space.validate({"width": 3, "depth": 3})


def test_an_empty_set_is_refused_when_the_space_is_made():
    numbers = {"width": Integer(1, 9), "depth": Integer(1, 9)}
    with pytest.raises(ValueError, match=r"No config was found that satisfies \['width \+ depth <= 1'\]"):
        Space(**numbers, constraints=["width + depth <= 1"])
    with pytest.raises(ValueError, match=r"No config was found that satisfies .*impossible"):
        Space(**numbers, constraints=[impossible])
    with pytest.raises(ValueError, match="broken raised KeyError"):
        Space(**numbers, constraints=[broken])
    with pytest.raises(ValueError, match="vague must return True or False, got"):
        Space(**numbers, constraints=[vague])


def test_a_constraint_that_leaves_nothing_of_one_option_is_refused_since_points_are_read_there():
    wide, narrow = {"layers": Integer(10, 20)}, {"layers": Integer(1, 20)}
    model = Choice({"wide": {"kind": Choice({"moe": wide, "dense": narrow})}, "narrow": narrow})
    message = r"satisfies \['layers <= 5'\] where there is model.wide.kind.moe.layers; loosen"
    with pytest.raises(ValueError, match=message):
        Space(model=model, constraints=["layers <= 5"])
    space = Space(model=model, constraints=["layers <= 10"])
    assert max(config["layers"] for config in space.decode_all(rng().random((200, len(space.columns))))) == 10


def test_a_constraint_on_what_does_not_vary_is_refused_or_says_nothing():
    fidelity = Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e8), target={"params": 1e6, "tokens": 1e8})
    with pytest.raises(ValueError, match=r"satisfies \['batch <= 5'\]; loosen"):
        Space(batch=7, lr=Real(0, 1), constraints=["batch <= 5"])
    with pytest.raises(ValueError, match=r"satisfies \['tokens <= 10000000.0 at tokens=100000000'\]; loosen"):
        Space(lr=Real(0, 1), constraints=["tokens <= 1e7"], fidelity=fidelity)
    for constraint in ("batch <= 7", "tokens <= 1e8"):
        space = Space(batch=7, lr=Real(0, 1), constraints=[constraint], fidelity=fidelity)
        at = space.at(fidelity.target)
        assert at.decode([0.25]) == {"batch": 7, "lr": 0.25}
        assert len(at.sample(rng(), 20)) == 20


def test_a_constraint_between_options_that_exclude_each_other_is_refused():
    options = Choice({"a": {"x": Real(0, 1)}, "b": {"y": Real(0, 1)}, "c": {"x": Real(0, 1), "y": Real(0, 1)}})
    assert Space(o=options, constraints=["x <= y"])
    with pytest.raises(ValueError, match=r"names \['x', 'y'\], which no config has together"):
        Space(o=Choice({name: options.subspaces[name] for name in "ab"}), constraints=["x <= y"])


def test_a_space_with_functions_is_stored_by_their_hash():
    space = Space(width=Integer(1, 9), depth=Integer(1, 9), constraints=["width <= depth", fits])
    written = space_to_json(space)
    assert written["constraints"][0] == "width <= depth"
    assert set(written["constraints"][1]) == {"function", "sha256"}
    assert space_from_json(written, constraints=[fits]) == space
    bare = space_from_json(written)
    assert bare == space
    assert bare.validate({"width": 1, "depth": 3}) == {"width": 1, "depth": 3}  # fits is not at hand
    with pytest.raises(ValueError, match="fits is not at hand; hand the space in"):
        bare.sample(rng(), 1)
    with pytest.raises(ValueError, match=r"has no constraint .*impossible"):
        space_from_json(written, constraints=[impossible])
    assert pickle.loads(pickle.dumps(space)) == space
    assert "constraints" not in space_to_json(Space(width=Integer(1, 9)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a < 1", "must compare by <= or >="),
        ("a == b", "compute one from the other"),
        ("f(a) <= 1", r"holds 'f\(a\)'"),
        ("a + b", "compares nothing"),
        ("0 <= a <= 1", "is a chain; write two"),
        ("1 <= 2", "names no parameter"),
        ("a <=", "is no expression of Python"),
        ("a.b <= 1", "holds 'a.b'"),
        ("__import__('os') <= a", "holds"),
        ("alpha + b <= 1", "did you mean 'a'|its names are"),
        ("kind <= 1", "needs numbers, and kind is Choice"),
    ],
)
def test_what_is_no_inequality_of_numbers_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Space(a=Real(0, 1), b=Real(0, 1), kind=Choice("x", "y"), constraints=[text])


def test_constraints_come_in_a_list():
    with pytest.raises(ValueError, match="constraints must be a list"):
        Space(a=Real(0, 1), constraints="a <= 1")
    with pytest.raises(ValueError, match="must be a text such as"):
        Space(a=Real(0, 1), constraints=[3])


def test_what_cannot_be_computed_does_not_hold():
    inequality = Inequality.of("1 / (a - b) <= 5")
    assert not inequality.holds({"a": 1.0, "b": 1.0})
    assert not Inequality.of("a ** 0.5 <= 5").holds({"a": -1.0})
    assert inequality.holds({"a": 1.0, "b": 0.5})
    assert inequality.holds({"a": 1.0})  # it speaks of more than this config has


def test_a_name_in_a_constraint_stands_for_one_thing():
    fidelity = Fidelity(steps=(10, 20), target={"steps": 20}, cost=lambda scale: scale["steps"])
    with pytest.raises(ValueError, match=r"names \['steps'\], which are parameters and scale axes"):
        Space(steps=Integer(1, 9), constraints=["steps <= 5"], fidelity=fidelity)


MOST = {"width": 9}


def within(config):
    return config["width"] <= MOST["width"]


def test_configs_that_were_written_are_read_though_a_predicate_has_changed_its_mind(monkeypatch):
    space = Space(width=Integer(1, 9), constraints=[within])
    written = space.to_json({"width": 8})
    monkeypatch.setitem(MOST, "width", 5)
    assert space.from_json(written) == {"width": 8}
    assert space.encode({"width": 8}).shape == (1,)
    with pytest.raises(ValueError, match=r"breaks the constraint .*:within"):
        space.validate({"width": 8})


def test_a_space_at_one_scale_can_be_asked_for_another_and_is_written_whole():
    fidelity = Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e8), target={"params": 1e6, "tokens": 1e8})
    data = Mixture("web", "code", supply={"code": 1e6})
    space = Space(batch=Integer(1, 4096, log=True), data=data, constraints=["batch * 1e5 <= tokens"], fidelity=fidelity)
    small, large = {"params": 1e5, "tokens": 1e6}, {"params": 1e6, "tokens": 1e8}
    assert space.at(small).at(large) == space.at(large) != space.at(small)
    assert space_from_json(space_to_json(space.at(large))) == space == space.at(large).whole
