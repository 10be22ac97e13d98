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
        "it knows ['fixed', 'real', 'integer', 'choice', 'mixture', 'schedule']."
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
    settings = space_to_json(Space(s=Schedule("cosine", "wsd")))["parameters"][0][1]["families"]
    assert settings == [
        ["cosine", {"warmup": 0.0, "floor": 0.0}],
        ["wsd", {"decay": 0.2, "warmup": 0.0, "floor": 0.0}],
    ]


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
