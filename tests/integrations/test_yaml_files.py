import math
import re

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from integrations import yaml_files
from integrations.yaml_files import (
    MADE_BY,
    config_from_yaml,
    config_to_yaml,
    load_config,
    load_space,
    save_config,
    save_space,
    space_from_yaml,
    space_to_yaml,
)
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space, space_to_json
from search_spaces.codec import KINDS
from search_spaces.fidelity import MeasuredCost
from search_spaces.mixture_schedule import MixtureSchedule
from search_spaces.parameter import Fixed

SCALE = {"params": (1, 2), "tokens": (1, 2), "target": {"params": 2, "tokens": 2}}


def cost(scale):
    return 2.0 * scale["steps"]


def fits(config):
    return config["x"] < 0.9


def read(parameter, **others):
    """What the text of one parameter, and texts beside the parameters, become."""
    rest = "".join(f"\n{key}: {text}" for key, text in others.items())
    return space_from_yaml(f"parameters:\n  x: {parameter}\n  other: {{kind: real, low: 0, high: 1}}{rest}")


HAND_WRITTEN = """
# A comment
parameters:
  lr: {kind: real, low: 1e-4, high: 1.e-2, log: true}
  batch: {kind: integer, low: 16, high: 0x100}
  momentum: 0.9
  size: {kind: choice, options: [s, m, l], ordered: true}
  flag: {kind: choice, options: ['yes', true, 1, 1.0, ~, 2026-01-01]}
  optimizer:
    kind: choice
    options:
      adamw:
        beta2: &beta {kind: real, low: 0.9, high: 0.999}
      lion: {beta2: *beta, eps: 1e-8}
      sgd: {}
  data: {kind: mixture, names: [code, docs], floor: {code: 0.1}, cap: 0.8}
  switched:
    kind: mixture_schedule
    first: {kind: mixture, names: [code, docs], supply: {code: 1e9}}
    last: {names: [code, docs]}
    switch: {low: 0.8, high: 0.9}
  schedule: {kind: schedule, families: [cosine], warmup: 0.02, wsd: {decay: {low: 0.05, high: 0.3}}}
constraints:
  - lr * batch <= 1
fidelity:
  axes:
    params: {rungs: {tiny: 1e5, small: 1e6}}
    tokens: {low: 1e6, high: 1e7}
    layers: {low: 1, high: 9, integer: true}
  target: {params: small, tokens: 1e7, layers: 9}
  cost: {seconds: 3.5, exponents: {params: 1, tokens: 1, layers: 0.5}}
"""


def test_a_hand_written_space_means_what_its_words_mean_in_python():
    space = Space(
        lr=Real(1e-4, 1e-2, log=True),
        batch=Integer(16, 256),
        momentum=0.9,
        size=Choice("s", "m", "l", ordered=True),
        flag=Choice("yes", True, 1, 1.0, None, "2026-01-01"),
        optimizer=Choice(
            {"adamw": {"beta2": Real(0.9, 0.999)}, "lion": {"beta2": Real(0.9, 0.999), "eps": 1e-8}, "sgd": {}}
        ),
        data=Mixture("code", "docs", floor={"code": 0.1}, cap=0.8),
        switched=MixtureSchedule(
            Mixture("code", "docs", supply={"code": 1e9}), Mixture("code", "docs"), Real(0.8, 0.9)
        ),
        schedule=Schedule("cosine", warmup=0.02, wsd={"decay": Real(0.05, 0.3)}),
        constraints=["lr * batch <= 1"],
        fidelity=Fidelity(
            MeasuredCost(3.5, {"params": 1, "tokens": 1, "layers": 0.5}),
            params={"tiny": 1e5, "small": 1e6},
            tokens=Real(1e6, 1e7),
            layers=Integer(1, 9),
            target={"params": "small", "tokens": 1e7, "layers": 9},
        ),
    )
    assert space_from_yaml(HAND_WRITTEN) == space
    assert space_from_yaml(space_to_yaml(space)) == space


def test_the_example_in_the_module_is_a_space():
    lines = (line.removeprefix("    ") for line in yaml_files.__doc__.splitlines() if line.startswith("    "))
    space = space_from_yaml("\n".join(lines))
    assert space.parameters["lr"] == Real(1e-4, 1e-2, log=True)
    assert space_from_yaml(space_to_yaml(space)) == space


def test_a_written_space_is_pleasant_to_read():
    space = Space(
        lr=Real(1e-4, 1e-2, log=True),
        momentum=0.9,
        optimizer=Choice({"adamw": {"beta2": Real(0.9, 0.999)}, "sgd": {}}),
        data=Mixture("code", "docs", floor=0.02),
        constraints=["lr <= beta2"],
        fidelity=Fidelity(params={"tiny": 1e5, "small": 1e6}, tokens=(1, 2), target={"params": "small", "tokens": 2}),
    )
    assert (
        space_to_yaml(space)
        == """\
parameters:
  lr: {kind: real, low: 0.0001, high: 0.01, log: true}
  momentum: 0.9
  optimizer:
    kind: choice
    options:
      adamw:
        beta2: {kind: real, low: 0.9, high: 0.999, log: false}
      sgd: {}
  data:
    kind: mixture
    names: [code, docs]
    floor: {code: 0.02, docs: 0.02}
constraints: [lr <= beta2]
fidelity:
  axes:
    params:
      rungs: {tiny: 100000.0, small: 1000000.0}
    tokens:
      rungs: [1.0, 2.0]
  target: {params: 1000000.0, tokens: 2.0}
"""
    )


def test_every_kind_of_parameter_has_a_row_in_the_table():
    assert MADE_BY.keys() == KINDS.keys()


odd = ["yes", "No", "on", "~", "null", "NULL", "", " ", "1e-4", "1_000", "010", "0x1F", "0o17", "1:30", ".inf", ".nan"]
odd += ["2026-01-01", "<<", "=", "true", "True", "# no", "a: b", "- a", "é", "😀", "\u2028", "\x85", "a\nb", "\t", "'"]
odd += [
    "a" * 150,
    "word " * 40,
    "\ud800",
    "\ufeff",
    "@",
    "%",
    "*a",
    "&a",
    "!a",
    "|",
    "{",
    "[",
    "? a",
    "\r\n",
    "---",
    "...",
]
texts = st.sampled_from(odd) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
leaves = st.one_of(
    scalars,
    st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)).filter(lambda b: b[0] < b[1]).map(lambda b: Real(*b)),
    st.sampled_from([Real(5e-324, 1e300, log=True), Integer(-3, 40), Integer(2, 2**40, log=True)]),
    st.builds(
        lambda options, ordered: Choice(options, ordered=ordered),
        st.lists(scalars, min_size=2, max_size=5, unique_by=lambda s: (type(s), s)),
        st.booleans(),
    ),
    st.sampled_from(
        [
            Mixture("a", "b"),
            Mixture("a", "b", "c", floor=0.05, cap={"a": 0.5}),
            Mixture("no", "1e3", "a", floor={"no": 0.1 + 0.2}, fixed={"1e3": 0.25}),
            Mixture("a", "b", "c", reference={"a": 0.2, "b": 0.3, "c": 0.5}),
            Mixture("a", "b", reference={"a": 0.2, "b": 0.8}, sampling="uniform"),
            Mixture("a", "b", supply={"a": 3.0, "b": 7}, max_epochs={"a": 2}),
            MixtureSchedule(Mixture("a", "b"), Mixture("a", "b", floor=0.1)),
            MixtureSchedule(Mixture("a", "b", supply={"a": 9}), Mixture("a", "b"), 0.75),
            Schedule("cosine"),
            Schedule("wsd", "rex", warmup=0.02, cosine={"floor": Real(0.01, 0.2, log=True)}),
            Schedule("linear", "cosine", warmup=Real(0, 0.1), floor=0.0),
        ]
    ),
)


def entries(depth, prefix=""):
    names = texts.map(lambda text: prefix + "." + text)
    plain = st.dictionaries(names, leaves, max_size=3)
    if depth == 0:
        return plain
    options = st.dictionaries(texts, entries(depth - 1, f"{prefix}o"), min_size=2, max_size=3)
    return st.builds(lambda some, choice: {**some, f"{prefix}o": Choice(choice)}, plain, options)


spaces = entries(2).map(lambda parameters: Space(fidelity=Fidelity(**SCALE), **parameters))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces)
def test_spaces_come_back_from_yaml(space):
    text = space_to_yaml(space)
    again = space_from_yaml(text)
    assert again == space
    assert repr(space_to_json(again)) == repr(space_to_json(space))
    assert space_to_yaml(again) == text


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces, st.integers(0, 99))
def test_configs_come_back_from_yaml_bit_for_bit(space, seed):
    rng = np.random.default_rng(seed)
    for config in space.decode_all(rng.random((2, len(space.columns)))):
        again = config_from_yaml(space, config_to_yaml(space, config))
        assert again == config
        assert repr(again) == repr(config)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(scalars)
@example("\ud800")
def test_readers_of_yaml_1_1_read_the_same_scalars(value):
    space = Space(x=value, y=Real(0, 1))
    read = yaml.safe_load(config_to_yaml(space, {"y": 0.5}))["x"]
    assert repr(read) == repr(value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        (".5", 0.5),
        ("-0.0", -0.0),
        ("1.", 1.0),
        ("010", 10),
        ("0o17", 15),
        ("-7", -7),
        ("'1e-4'", "1e-4"),
        ("!!str 1e-4", "1e-4"),
        ("!!float 3", 3.0),
        ("1e", "1e"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("'yes'", "yes"),
        ('"Off"', "Off"),
        ("yes please", "yes please"),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ("''", ""),
        ("2026-01-01", "2026-01-01"),
        ("0.1.2", "0.1.2"),
        ("nan", "nan"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written, value):
    assert read(written).parameters["x"] == Fixed(value)
    assert repr(read(written).parameters["x"].value) == repr(value)


@pytest.mark.parametrize("written", ["yes", "No", "ON", "off", "{kind: choice, options: [a, no]}", "{on: 1}"])
def test_a_bare_word_that_is_a_bool_to_other_readers_is_refused(written):
    with pytest.raises(ValueError, match=r"line 2: \w+ is read in more than one way; write true or false, or put it"):
        read(written)


def test_a_key_that_merges_for_other_readers_is_refused():
    with pytest.raises(ValueError, match="line 3: << is read in more than one way; write the mapping out"):
        read("&x {kind: real, low: 0, high: 1}\n  y: {<<: *x, high: 2}")


def test_functions_are_handed_in_and_never_run_from_yaml():
    space = Space(
        x=Real(0, 1), constraints=["x >= 0.1", fits], fidelity=Fidelity(cost, steps=(1, 2), target={"steps": 2})
    )
    text = space_to_yaml(space)
    assert space_from_yaml(text) == space
    assert space_from_yaml(text).constraints[1].stored.function is None
    again = space_from_yaml(text, cost=cost, constraints=[fits])
    assert again.fidelity.cost({"steps": 2}) == 4
    assert again.sample(np.random.default_rng(0), 3) == space.sample(np.random.default_rng(0), 3)


def test_files_come_back_and_are_replaced_as_a_whole(tmp_path, monkeypatch):
    space = Space(x=Real(0, 1), s=Schedule("cosine", "rex"), name="é\r\n")
    path = tmp_path / "space.yaml"
    save_space(Space(x=Real(0, 1)), path)
    save_space(space, str(path))
    assert load_space(path) == space
    config = space.sample(np.random.default_rng(0), 1)[0]
    save_config(space, config, tmp_path / "config.yaml")
    assert load_config(space, str(tmp_path / "config.yaml")) == config
    before = path.read_bytes()

    def broken(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space left"):
        save_space(Space(x=Real(0, 2)), path)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.yaml", "space.yaml"]


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("parameters:\n  x: {kind: real, low: 0, high: 1}\n  x: 3\n")
    message = f"{path}, line 3: the key 'x' is there twice, first in line 2."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_space(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no text in UTF-8 "):
        load_space(path)
    path.write_text("y: 1\n")
    message = f"{path}: Config has a value for 'y', which the space does not know; its names are ['x']."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_config(Space(x=Real(0, 1)), path)
    with pytest.raises(FileNotFoundError):
        load_space(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The YAML text is empty."),
        ("- 1", "The YAML text: a config must be a mapping (name: value), got [1]."),
        ("x: 2", "The YAML text: x must be a number in [0.0, 1.0], got 2."),
        ("xx: 0.5", "The YAML text: Config has a value for 'xx', which the space does not know; did you mean 'x'?"),
        ("{}", "The YAML text: Config has no value for ['x']; the space needs it."),
        ("x: 1\nx: 1", "The YAML text, line 2: the key 'x' is there twice, first in line 1."),
        ("x:", "The YAML text, line 1: a value is missing; write null for None, {} for an empty mapping."),
    ],
)
def test_a_wrong_config_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config_from_yaml(Space(x=Real(0, 1)), text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "The YAML text: a space must be a mapping (name: value), got 'x'."),
        (
            "a: b: c",
            "The YAML text, line 1: no YAML that can be read here (mapping values are not allowed here).",
        ),
        (
            "a:\n  - {b",
            "The YAML text, line 2: no YAML that can be read here (while parsing a flow mapping, expected ',' or '}', ",
        ),
        ("a: 1\n---\nb: 1", "The YAML text, line 2: no YAML that can be read here (expected a single document"),
        ("a: \x00", "The YAML text: no YAML that can be read here (unacceptable character #x0000:"),
        ("a: *b", "The YAML text, line 1: no YAML that can be read here (found undefined alias 'b')."),
        ("a: &b [*b]", "The YAML text: aliases stand for more than 100000 values, or for themselves; write them out."),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(20)),
            "The YAML text: aliases stand for more than 100000 values, or for themselves; write them out.",
        ),
        ("[" * 5000, "The YAML text is nested too deeply to be read."),
        (
            "a: !!python/object/apply:os.system [ls]",
            "The YAML text, line 1: the tag !!python/object/apply:os.system is not read here; leave it out.",
        ),
        ("a: !!set {b}", "The YAML text, line 1: the tag !!set is not read here; leave it out."),
        ("a: !!int 1e4", "The YAML text, line 1: invalid literal for int() with base 10: '1e4'."),
        ("1: a", "The YAML text, line 1: a key must be a text, got 1; put it in quotes."),
        ("parametrs: {}", "The YAML text, line 1: a space has no 'parametrs'; did you mean 'parameters'?"),
        ("fidelity: {}", "The YAML text, line 1: a space needs 'parameters', got ['fidelity']."),
        (
            "parameters: {x: {kind: real, low: 0, high: 1}, fidelity: 3}",
            "The YAML text, line 1: 'fidelity' is an argument of Space and cannot name a parameter; rename it.",
        ),
        (
            "parameters: {x: 1}",
            "The YAML text: Space has nothing to search; give it at least one parameter that is not",
        ),
    ],
)
def test_a_text_that_is_no_space_is_refused_with_its_line(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        space_from_yaml(text)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (".inf", "x: A fixed value must be text, a finite number, a bool or None, got inf."),
        ("[1, 2]", "x is a list; write {kind: choice, options: [...]} for one of them, got [1, 2]."),
        ("{low: 1}", "x needs a kind of parameter, got kind=None; there are ['fixed', 'real', 'integer', "),
        ("{kind: rael}", "x needs a kind of parameter, got kind='rael'; did you mean 'real'?"),
        ("{kind: real, low: 0, hihg: 1}", "x has no 'hihg'; did you mean 'high'?"),
        ("{kind: real, low: 0}", "x needs 'high', got ['kind', 'low']."),
        (
            "{kind: real, low: 3, high: 1}",
            "x: Real needs low < high, got low=3.0, high=1.0; a fixed value needs no Real.",
        ),
        (
            "{kind: integer, low: 1, high: 1e3}",
            "x: Integer needs whole numbers up to 2**44 as bounds, got high=1000.0.",
        ),
        ("{kind: real, low: 1_0, high: 1}", "x: Real needs finite numbers as bounds, got low='1_0'."),
        ("{kind: choice}", "x needs 'options', got ['kind']."),
        ("{kind: choice, options: ab}", "x.options must be a list ([one, two]), got 'ab'."),
        ("{kind: choice, options: [a, b], orderd: true}", "x has no 'orderd'; did you mean 'ordered'?"),
        (
            "{kind: choice, options: {a: {}, b: {}}, ordered: true}",
            "x: Choice of sub-spaces has no order, since their parameters differ; leave ordered= out.",
        ),
        ("{kind: choice, options: {a: 3, b: {}}}", "x.a must be a mapping (name: value), got 3."),
        (
            "{kind: choice, options: {a: {lr: {kind: real, low: 0, high: 0}}, b: {}}}",
            "x.a.lr: Real needs low < high, got low=0.0, high=0.0; a fixed value needs no Real.",
        ),
        ("{kind: mixture, names: ab}", "x.names must be a list ([one, two]), got 'ab'."),
        ("{kind: mixture, names: [a, b], flor: 0.1}", "x has no 'flor'; did you mean 'floor'?"),
        ("{kind: mixture_schedule, first: {names: [a, b]}}", "x needs 'last', got ['kind', 'first']."),
        ("{kind: mixture_schedule, first: 3, last: 3}", "x.first must be a mapping (name: value), got 3."),
        ("{kind: schedule, families: [cosine, wsb]}", "x: 'wsb' is no schedule family; "),
        ("{kind: schedule, families: cosine}", "x.families must be a list ([one, two]), got 'cosine'."),
        (
            "{kind: schedule, families: [cosine], warmpu: 0.1}",
            "x: Schedule with the families ['cosine'] has no setting ",
        ),
        ("{kind: schedule, families: [cosine], warmup: {low: 0, hi: 1}}", "x.warmup has no 'hi'; did you mean 'high'?"),
        (
            "{kind: schedule, families: [cosine], warmup: {kind: integer, low: 0, high: 1}}",
            "x.warmup must be of kind 'real', got 'integer'.",
        ),
        (
            "{kind: mixture_schedule, first: {kind: choice, options: [a, b]}, last: {names: [a, b]}}",
            "x.first must be of kind 'mixture', got 'choice'.",
        ),
        (
            "{kind: schedule, families: {wsd: {}}, wsd: {decay: 0.2}}",
            "x has the family 'wsd' twice; each may be there once.",
        ),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name_and_line(parameter, message):
    with pytest.raises(ValueError, match=f"^The YAML text, line 2: {re.escape(message)}"):
        read(parameter)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"constraints": "x <= 1"}, ", line 4: constraints must be a list ([one, two]), got 'x <= 1'."),
        ({"constraints": "[x < 1]"}, ": constraints: The constraint 'x < 1' must compare by <= or >=;"),
        ({"constraints": "[{function: a:b}]"}, ": constraints: has no 'sha256'; it needs ['function', 'sha256']."),
        ({"fidelity": "{axes: {}}"}, ", line 4: fidelity needs 'target', got ['axes']."),
        (
            {"fidelity": "{axes: {}, target: {}, runable: {}}"},
            ", line 4: fidelity has no 'runable'; did you mean 'runnable'?",
        ),
        (
            {"fidelity": "{axes: {}, target: {}, cost: steps}"},
            ", line 4: fidelity.cost must be a mapping (name: value), got 'steps'.",
        ),
        ({"fidelity": "{axes: {tokens: 3}, target: {}}"}, ", line 4: fidelity.axes.tokens must be a mapping "),
        (
            {"fidelity": "{axes: {tokens: {rung: [1]}}, target: {}}"},
            ", line 4: fidelity.axes.tokens has no 'rung'; did you",
        ),
        (
            {"fidelity": "{axes: {tokens: {low: 1}}, target: {}}"},
            ", line 4: fidelity.axes.tokens needs 'high', got ['low'].",
        ),
        (
            {"fidelity": "{axes: {tokens: {rungs: [1, 2], integer: true}}, target: {}}"},
            ", line 4: fidelity.axes.tokens has no 'integer'; there are ['rungs'].",
        ),
    ],
)
def test_wrong_constraints_and_fidelities_are_refused(others, message):
    with pytest.raises(ValueError, match=f"^The YAML text{re.escape(message)}"):
        read(1, **others)


def test_numbers_that_differ_in_the_last_bit_stay_different():
    space = Space(x=Real(0, 1))
    value = math.nextafter(0.1, 1)
    assert config_from_yaml(space, config_to_yaml(space, {"x": value})) == {"x": value}
