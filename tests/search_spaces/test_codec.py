import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space, space_from_json, space_to_json
from search_spaces.codec import KINDS
from search_spaces.parameter import Parameter


def cost(scale):
    return 2.0 * scale["steps"]


def other_cost(scale):
    return 3.0 * scale["steps"]


FIDELITIES = {
    "rungs": Fidelity(params={"b": 2, "a": 1}, tokens=(1, 2), target={"params": "b", "tokens": 2}),
    "ranges": Fidelity(params=Integer(1, 9), tokens=Real(1.5, 9), target={"params": 9, "tokens": 9}),
    "runnable": Fidelity(
        params=(1, 2), tokens=(3,), runnable={"params": 2, "tokens": 3}, target={"params": 9, "tokens": 9}
    ),
    "cost": Fidelity(steps=(1, 2), target={"steps": 2}, cost=cost),
}


def there_and_back(space, **given):
    return space_from_json(json.loads(json.dumps(space_to_json(space), sort_keys=True)), **given)


def subclasses(kind):
    return {kind} | {deeper for each in kind.__subclasses__() for deeper in subclasses(each)}


def test_every_parameter_class_has_one_row_in_the_table():
    made = [row.made for row in KINDS.values()]
    assert len(made) == len(set(made))
    assert {cls for cls in subclasses(Parameter) - {Parameter} if cls.__module__.startswith("search_spaces.")} == set(
        made
    )


@pytest.mark.parametrize("name", FIDELITIES)
def test_a_fidelity_comes_back_from_json(name):
    space = Space(x=Real(0, 1), fidelity=FIDELITIES[name])
    again = there_and_back(space)
    assert again == space
    assert again.fidelity.axes == FIDELITIES[name].axes
    assert again.fidelity.cells() == FIDELITIES[name].cells()


def test_a_cost_function_is_never_run_from_json():
    space = Space(x=Real(0, 1), fidelity=FIDELITIES["cost"])
    stored = space_to_json(space)["fidelity"]["cost"]
    assert stored["function"] == f"{__name__}:cost"
    with pytest.raises(ValueError, match=r"^The cost function .*:cost is not at hand; hand it in as cost=\.$"):
        there_and_back(space).fidelity.cost({"steps": 2})
    assert there_and_back(space, cost=cost).fidelity.cost({"steps": 2}) == 4


def test_a_changed_cost_function_is_refused():
    space = Space(x=Real(0, 1), fidelity=FIDELITIES["cost"])
    with pytest.raises(ValueError, match=r":other_cost differs from .*:cost, with which this space was made"):
        there_and_back(space, cost=other_cost)


@pytest.mark.parametrize(
    ("fidelity", "message"),
    [
        (None, "This space has no fidelity, so there is no cost to hand in; leave cost= out."),
        (FIDELITIES["rungs"], "This space counts costs as 6 N D, so there is no cost to hand in; leave cost= out."),
    ],
)
def test_a_cost_that_the_space_does_not_use_is_refused(fidelity, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        there_and_back(Space(x=Real(0, 1), fidelity=fidelity), cost=cost)


def test_an_unknown_kind_is_refused():
    message = (
        "x is of kind 'graph', which this version does not know; "
        "it knows ['fixed', 'real', 'integer', 'choice', 'mixture', 'mixture_schedule', 'schedule']."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        space_from_json({"parameters": [["x", {"kind": "graph"}]], "fidelity": None})


def test_a_parameter_class_without_a_row_is_refused():
    class Unit(Real):
        pass

    message = "x is a Unit, which has no row in codec.KINDS; the kinds are"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        space_to_json(Space(x=Unit(0, 1)))


def test_a_stored_schedule_keeps_the_defaults_of_its_day():
    stored = space_to_json(Space(s=Schedule("cosine", "wsd", warmup=0.0)))["parameters"][0][1]
    assert stored["families"] == [
        ["cosine", {"warmup": 0.0}],
        ["wsd", {"decay": {"low": 0.05, "high": 0.5, "log": False}, "warmup": 0.0}],
    ]
    assert stored["shared"] == {"floor": {"low": 0.0, "high": 0.2, "log": False}}


def test_importing_search_spaces_brings_in_numpy_only():
    heavy = ("torch", "scipy", "pandas", "ray", "botorch")
    code = f"import sys, search_spaces; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_space_read_back_samples_the_same_configs():
    space = Space(
        lr=Real(1e-5, 1, log=True),
        data=Mixture("a", "b", "c"),
        o=Choice({"x": {"n": Integer(1, 9)}, "y": {}}),
        s="fixed",
    )
    samples = [each.sample(np.random.default_rng(1), 10) for each in (space, there_and_back(space))]
    assert samples[0] == samples[1]


REAL = {"kind": "real", "low": 0.0, "high": 1.0, "log": False}


RUNGS = {"name": "n", "rungs": [1, 2], "labels": []}
RANGE = {"name": "n", "low": 1.0, "high": 2.0, "integer": True}


def written(*parameters, **more):
    return {"parameters": list(parameters), "fidelity": None} | more


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([], "space: expected an object with the keys"),
        ({"parameters": []}, "space: has no 'fidelity'; it needs"),
        (written(constraint=[]), "space: has an unknown key 'constraint'; did you mean 'constraints'?"),
        (written(constraints="x <= 1"), "constraints: needs a list as constraints, got 'x <= 1'."),
        (written(["x", REAL], constraints=[{"function": "a:b"}]), "constraints: has no 'sha256'"),
        ({"parameters": {"x": REAL}, "fidelity": None}, "parameters: needs a list as it, got"),
        (written(["x", REAL], ["x", REAL]), "parameters: has 'x' twice"),
        (written(["fidelity", REAL]), "parameters: 'fidelity' is an argument of every space"),
        (written(["x", 3]), "x must be an object with its kind, got 3."),
        (written(["x", REAL | {"hihg": 2}]), "x: has an unknown key 'hihg'; did you mean 'high'?"),
        (written(["x", {"kind": "real", "low": 0}]), "x: has no 'high'; it needs ['low', 'high']."),
        (written(["x", {"kind": "real", "low": 2, "high": 1}]), "x: Real needs low < high"),
        (written(["x", {"kind": "choice", "options": "ab"}]), "x: needs a list as options, got 'ab'."),
        (written(["x", {"kind": "choice"}]), "x: has no 'options'"),
        (written(["x", {"kind": "choice", "subspaces": [["a", [["y", {"kind": "rael"}]]]]}]), "x: y is of kind 'rael'"),
        (
            written(["x", {"kind": "mixture", "names": ["a", "b"], "floors": [0]}]),
            "x: needs a number in floors for each",
        ),
        (written(["x", {"kind": "schedule", "families": [["rex", []]], "shared": {}}]), "x: needs an object name ->"),
        (written(["x", {"kind": "schedule", "families": []}]), "x: has no 'shared'"),
        (
            written(["x", REAL], fidelity={"axes": [], "target": {}, "runable": None, "cost": None}),
            "fidelity: has an unknown key 'runable'; did you mean 'runnable'?",
        ),
        (
            written(["x", REAL], fidelity={"axes": [{"name": "n"}], "target": {}, "runnable": None, "cost": None}),
            "fidelity: has no 'low'",
        ),
        *[
            (
                written(["x", REAL], fidelity={"axes": [axis], "target": {}, "runnable": None, "cost": cost}),
                message,
            )
            for axis, cost, message in [
                (RUNGS | {"name": 3}, None, "fidelity: needs texts in name, got 3."),
                (RUNGS | {"rungs": 5}, None, "fidelity: n: needs a list as rungs, got 5."),
                (RUNGS | {"labels": ["a"]}, None, "fidelity: n: needs a label for each of [1, 2], or none, got ['a']."),
                (RANGE | {"low": None}, None, "fidelity: n: Real needs finite numbers as bounds, got low=None."),
                (RUNGS, 5, "expected an object with the keys ['seconds', 'exponents'], got 5."),
                (RUNGS, {"seconds": 1.0, "exponents": ["n"]}, "needs pairs [name, value] in exponents, got 'n'."),
            ]
        ],
        (written(["x", {"kind": "mixture", "names": [[], "b"], "floors": [0, 0]}]), "x: needs texts in names, got []."),
    ],
)
def test_json_that_is_no_space_is_refused_where_it_is_wrong(obj, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        space_from_json(obj)
