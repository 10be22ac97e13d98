"""Progress: lines that stay for results, on a terminal one line that moves, in a log file none."""

import io

import pytest

from bo import Minimize, Study, run
from integrations.describe import quantity, summary
from integrations.progress import Progress
from search_spaces import Fidelity, Real, Space


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(trial):
    trial.report(3, {"loss": 9.0})
    if trial.id == 2:
        raise RuntimeError("no data")
    return {"loss": 2.0 + trial.config["lr"]}


@pytest.fixture
def study(tmp_path):
    space = Space(
        lr=Real(0.0, 1.0),
        fidelity=Fidelity(params={"s": 1e5, "l": 1e6}, tokens=(1e6,), target={"params": "l", "tokens": 1e6}),
    )
    with Study.create(tmp_path / "study", space, objective=Minimize("loss"), policy="sobol") as made:
        made.enqueue({"lr": 0.5}, {"params": "s", "tokens": 1e6})
        made.enqueue({"lr": 0.9})
        yield made


def test_a_log_file_gets_a_line_for_each_start_and_each_result(study):
    log = io.StringIO()
    run(study, train, n_trials=4, watch=Progress(study, log))

    lines = log.getvalue().splitlines()
    assert len(lines) == 8
    assert "\x1b" not in log.getvalue()
    assert "\r" not in log.getvalue()
    assert "s params, 1M tokens" in lines[1]
    assert "2.5000" in lines[1]
    assert "failed: RuntimeError: no data" in lines[5]


def test_a_terminal_gets_the_results_and_one_line_that_moves(study):
    terminal = Terminal()
    progress = Progress(study, terminal)
    run(study, train, n_trials=4, watch=progress)
    progress.close()

    text = terminal.getvalue()
    assert text.count("\n") == 4, "only results stay"
    assert "#0 step 3" in text
    assert "4/4 trials" in text
    assert text.endswith("\r\x1b[K")


def test_the_summary_compares_with_the_users_recipe_and_says_what_to_run_next(study):
    run(study, train, n_trials=6)

    text = summary(study)

    assert "better than your recipe" in text
    assert "Proxies: 1 small runs cost 0.10 target runs in all" in text
    assert f"windtunnel resume {study.folder} --trials 9" in text
    assert "the last failure: trial 2: RuntimeError: no data" in text


@pytest.mark.parametrize(
    ("number", "words"), [(0.5, "0.5"), (40e3, "40k"), (150e3, "150k"), (900e3, "900k"), (1.5e6, "1.5M"), (2e10, "20B")]
)
def test_quantities_are_short(number, words):
    assert quantity(number) == words
