"""The page "Choose how to search" is true: its snippets run as printed, and whatever its tables name can be chosen."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import bo
from bo import Minimize, Study, objective
from bo.acquisition.acquisition import ACQUISITIONS
from bo.policies.bayes import Bayes
from bo.ports import POLICIES
from bo.surrogates.surrogate import SURROGATES
from search_spaces import Choice, Real, Space

PAGE = (Path(bo.__file__).parent / "README.md").read_text(encoding="utf-8")
NAME = "choose_how_to_search"
#: What makes a criterion quick enough for a test.
QUICK = {
    "knowledge_gradient": {"points": 64, "steps": 1},
    "knowledge_gradient_one_shot": {"points": 64, "steps": 1, "fantasies": 4},
}
SPACE = Space(lr=Real(1e-4, 1e-1, log=True), optimizer=Choice("adamw", "lion"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the snippets make, run in their order in an empty folder."""
    # Everything but the snippets is blanked, so that a traceback has the page's own line numbers.
    lines, inside = [], False
    for line in PAGE.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    folder = tmp_path_factory.mktemp("page")
    script = folder / f"{NAME}.py"  # in a file, since functions are stored by their source
    script.write_text("\n".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, script)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, NAME, module)  # the page's own acquisition is looked up by it
        spec.loader.exec_module(module)
        yield module


def decided(folder, settings, asks):
    """The trials that the model chose after six told runs, each while those before it run."""
    study = Study.create(folder, SPACE, objective=Minimize("loss"), policy="bayes", settings=settings)
    for config in SPACE.sample(np.random.default_rng(0), 6):
        study.add(config, {"loss": (math.log10(config["lr"]) + 2.5) ** 2 + 0.1 * (config["optimizer"] == "lion")})
    return [trial for _ in range(asks) for trial in study.ask(1)]


def test_every_snippet_runs_as_printed(page):
    assert page.study.best() is not None


def test_the_diagnosis_has_the_lines_that_the_page_shows(page):
    """All but the numbers, and the order that follows from them."""

    def words(lines):
        return {" ".join(re.findall("[a-z_]+", line.split(":")[0])) for line in lines}

    shown = PAGE.split("```text\n")[1].split("```")[0].splitlines()
    assert words(shown) == words(page.found.words().splitlines())


def test_an_acquisition_in_a_file_and_a_row_can_be_chosen(page, tmp_path, monkeypatch):
    monkeypatch.setitem(ACQUISITIONS, "improvement", f"{NAME}:make")
    settings = {"acquisition": "improvement", "options": {"margin": 0.01}}
    assert [trial.source for trial in decided(tmp_path / "study", settings, 1)] == ["bayes"]


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_every_acquisition_is_on_the_page_and_leads_a_search(name, tmp_path):
    first, second = decided(tmp_path / "study", {"acquisition": name, "options": QUICK.get(name, {})}, 2)
    assert f"| `{name}`" in PAGE
    assert first.source == second.source == "bayes"
    assert first.config != second.config


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_is_on_the_page_and_leads_a_search(name, tmp_path):
    (trial,) = decided(tmp_path / "study", {"surrogate": name}, 1)
    assert f"| `{name}`" in PAGE
    assert trial.source == "bayes"


@pytest.mark.parametrize("name", [*POLICIES, *vars(Bayes())])
def test_every_policy_and_every_setting_of_the_engine_is_on_the_page(name):
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("kind", [*objective.KINDS.values(), *objective.LIMITS.values()])
def test_every_kind_of_objective_and_limit_is_on_the_page(kind):
    assert f"{kind.__name__}(" in PAGE
