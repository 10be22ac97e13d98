"""The page that a study is reported on."""

import html as html_of_python
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bo import AtMost, Largest, Maximize, Minimize, Pareto, Study, WeightedSum
from integrations import report
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space

SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    batch_size=Integer(16, 256, log=True),
    optimizer=Choice({"adamw": {"beta": Real(0.9, 0.99)}, "lion": {}}),
    data=Mixture("code", "prose"),
    schedule=Schedule("cosine", warmup=0.0, floor=0.0, wsd={"decay": Real(0.1, 0.5)}),
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7}),
)
OBJECTIVES = {
    "minimize": Minimize("loss"),
    "maximize under a limit": Maximize("loss", subject_to=[AtMost("size", 3.0)]),
    "weighted": WeightedSum({"loss": 0.5, "size": 0.5}),
    "largest": Largest("loss", "size"),
    "pareto": Pareto(Minimize("loss"), Minimize("size")),
}


class Wellformed(HTMLParser):
    """Fails where tags do not close in the order they were opened; keeps the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    parser = Wellformed()
    parser.feed(page)
    assert parser.open == []
    return " ".join(parser.text)


@pytest.fixture
def make(tmp_path):
    def made(objective, trials=12, **settings):
        study = Study.create(tmp_path / "study", SPACE, objective=objective, policy="sobol", **settings)
        for trial in study.ask(trials) if trials else ():
            study.tell(trial.id, {"loss": 2.0 + trial.config["lr"], "size": 2.0 + trial.id % 3}, seconds=1.5)
        return study

    return made


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_page(make, name):
    study = make(OBJECTIVES[name])
    study.ask(1)
    text = read(report.html(study))
    assert "12 finished, 1 running" in text
    assert "What was found" in text or "the front" in text
    assert ("The best configuration" in text) == (name != "pareto")


def test_a_study_of_nothing_has_a_page(make):
    assert "0.00" in read(report.html(make(Minimize("loss"), trials=0)))


def test_what_failed_or_diverged_is_told_with_its_traceback(make):
    study = make(Minimize("loss"), trials=2)
    for trial in study.ask(2):
        study.fail(trial.id, f"it broke {trial.id}", diverged=bool(trial.id % 2), traceback="Traceback of it")
    text = read(report.html(study))
    assert "Trial 2: it broke 2" in text
    assert "Traceback of it" in text
    assert "1 diverged" in text


def test_words_of_users_are_text_and_never_markup(make):
    study = make(Minimize("loss"), trials=1)
    (trial,) = study.ask(1)
    study.fail(trial.id, "<script>alert(1)</script> & more", traceback="</pre><script>alert(2)</script>")
    page = report.html(study)
    assert "<script" not in page
    assert html_of_python.escape("<script>alert(1)</script> & more") in page
    assert "alert(2)" in read(page)


def test_the_page_asks_nothing_of_the_network(make):
    page = report.html(make(Minimize("loss")))
    assert "<link" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page


def test_what_the_model_was_found_to_know_is_on_the_page(make):
    diagnosed = {
        "coverage": [{"level": 0.9, "inside": 9, "runs": 10}],
        "effects": [{"parameter": "lr", "given": "", "first": 0.7, "total": 0.8}],
        "drifts": [
            {"parameter": "lr", "axis": "params", "metric": "loss", "exponent": -0.4, "low": -0.6, "high": -0.2}
        ],
        "trust": "trusted: 5 scales that span the way to the target",
    }
    text = read(report.html(make(Minimize("loss")), diagnosed))
    assert "trusted: 5 scales" in text
    assert "9 of 10 (nominal 90%)" in text
    assert "-0.60 to -0.20" in text


def test_it_is_written_whole_for_its_owner_alone(make):
    study = make(Minimize("loss"))
    path = report.write(study)
    assert path == study.folder / "report.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each for each in study.folder.iterdir() if each.name.startswith(".report")] == []
    before = path.read_text()
    assert report.write(study).read_text().partition("Written")[0] == before.partition("Written")[0]


def test_stored_numbers_that_are_damaged_are_left_out(tmp_path):
    assert report.load_diagnosed(tmp_path / "none.json") is None
    (tmp_path / "torn.json").write_text('{"coverage": [')
    assert report.load_diagnosed(Path(tmp_path / "torn.json")) is None
