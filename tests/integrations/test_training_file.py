"""FILE of `windtunnel run FILE`: loaded as the module it is, checked at the door, sent to workers by its text."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from bo import Minimize
from integrations.training_file import TrainingFile
from search_spaces import Real, Space

GOOD = """
import sys
from bo import Minimize
from search_spaces import Real, Space

space = Space(lr=Real(0.0, 1.0))
objective = Minimize("loss")
seen = sys.argv

def train(trial):
    return {"loss": trial}
"""


@pytest.fixture(autouse=True)
def imports_stay_here(monkeypatch):
    """Loading a file changes sys.path and sys.modules; here they are put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    yield
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def make(text=GOOD, name="my_job.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


def test_it_gives_what_the_file_defines(write):
    more = "budget = 8.0\nn_trials = 4\nbaseline = {'lr': 0.1}\npolicy = 'sobol'\nresources = {'num_cpus': 2}\n"
    more += "settings = {'scale': 'target'}\n"
    loaded = TrainingFile(write(GOOD + more)).load()

    assert loaded.space == Space(lr=Real(0.0, 1.0))
    assert loaded.objective == Minimize("loss")
    assert loaded.train(3.0) == {"loss": 3.0}
    assert (loaded.budget, loaded.n_trials, loaded.baseline) == (8.0, 4, {"lr": 0.1})
    assert (loaded.policy, loaded.settings, loaded.resources) == ("sobol", {"scale": "target"}, {"num_cpus": 2})


def test_what_is_optional_may_be_absent(write):
    loaded = TrainingFile(write()).load()
    assert [loaded.budget, loaded.n_trials, loaded.baseline, loaded.policy, loaded.resources] == [None] * 5


def test_it_sees_its_arguments_and_nobody_else_does(write):
    before = sys.argv
    path = write()
    TrainingFile(path, ("--size", "3")).load()

    assert sys.modules["my_job"].seen == [str(path), "--size", "3"]
    assert sys.argv is before


def test_a_file_beside_it_can_be_imported(write):
    write("value = 5", "beside_it.py")
    assert TrainingFile(write("from beside_it import value\n" + GOOD)).load().train(1.0) == {"loss": 1.0}


def test_a_file_in_a_package_has_its_dotted_name_and_relative_imports(write):
    write("", "lab/__init__.py")
    write("", "lab/jobs/__init__.py")
    write("value = 5", "lab/jobs/parts.py")
    loaded = TrainingFile(write("from .parts import value\n" + GOOD, "lab/jobs/mine.py")).load()

    assert loaded.train.__module__ == "lab.jobs.mine"
    assert sys.modules["lab.jobs"].mine.value == 5


def test_it_runs_once_a_process(write):
    file = TrainingFile(write(GOOD + "\nruns = []\n"))
    assert file.load().train is file.load().train
    assert file.load().train is TrainingFile(file.path).load().train
    assert file.load().train is not replace(file, args=("--other",)).load().train


def test_files_of_one_name_in_two_folders_do_not_meet(write):
    one, two = write(name="a/job.py"), write(GOOD.replace("loss", "error"), name="b/job.py")
    assert TrainingFile(one).load().objective == Minimize("loss")
    assert TrainingFile(two).load().objective == Minimize("error")


def test_an_edit_shows_in_the_hash_and_not_in_a_sweep_that_runs(write):
    path = write()
    before = TrainingFile(path)
    path.write_text(GOOD.replace('"loss": trial', '"loss": 2 * trial'))
    after = TrainingFile(path)

    assert before.sha256 != after.sha256
    assert before.train(3.0) == {"loss": 3.0}
    assert after.train(3.0) == {"loss": 6.0}


def test_its_training_function_travels_to_a_process_that_has_not_loaded_it(write):
    file = TrainingFile(write(GOOD.replace("import sys", "import sys\nprint(sys.argv[1:], __name__)")), ("-x",))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(3.0))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(file.train), capture_output=True, check=True)

    assert done.stdout.decode() == "['-x'] my_job\n{'loss': 3.0}\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("objective = Minimize", "other = Minimize", r"must define space, objective and train; it has no objective\."),
        ("def train", "def tain", r"must define space, objective and train; it has no train\."),
        ("space = Space(lr=Real(0.0, 1.0))", "space = {}", r"space must be a Space, got {}\."),
        ('Minimize("loss")', '"loss"', r"objective must be an objective such as Minimize\('loss'\), got 'loss'\."),
        ("seen = sys.argv", "baseline = 3", r"baseline must be a config, got 3\."),
        ("seen = sys.argv", "policy = 'grid'", r"policy must be one of bayes, ladder, .*, got 'grid'\."),
        ("seen = sys.argv", "resources = 2", r"resources must be a dictionary such as .*, got 2\."),
        ("seen = sys.argv", "n_trials = 2.5", r"n_trials must be a whole number of at least 1, got 2\.5\."),
        ("seen = sys.argv", "budget = -1", r"budget must be a finite number above 0, .*, got -1\."),
        (
            "seen = sys.argv",
            "import no_such",
            r"cannot be loaded: line 8: ModuleNotFoundError: No module named 'no_such'",
        ),
        ("seen = sys.argv", "seen = (", r"cannot be loaded: line 8: SyntaxError: '\(' was never closed"),
        ("seen = sys.argv", "sys.exit('no data')", r"cannot be loaded: it ended with exit status no data\."),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_sentence(write, old, new, message):
    file = TrainingFile(write(GOOD.replace(old, new)))
    with pytest.raises(ValueError, match=message) as caught:
        file.load()
    assert str(file.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "my_job" not in sys.modules or "cannot be loaded" not in message


def test_the_error_of_a_file_is_chained(write):
    with pytest.raises(ValueError, match="ZeroDivisionError") as caught:
        TrainingFile(write("1 / 0")).load()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_asking_a_file_for_help_is_no_error(write):
    with pytest.raises(SystemExit) as caught:
        TrainingFile(write("import argparse; argparse.ArgumentParser().parse_args()"), ("--help",)).load()
    assert caught.value.code == 0


@pytest.mark.parametrize("name", ["json.py", "statistics.py", "numpy.py"])
def test_a_name_that_would_hide_another_module_is_refused(write, name):
    with pytest.raises(
        ValueError, match=f"would take the place of the module '{name[:-3]}'; give the file another name"
    ):
        TrainingFile(write(name=name)).load()


def test_a_file_that_is_not_there_or_no_python_is_refused(tmp_path):
    (tmp_path / "folder.py").mkdir()
    for name in ("absent.py", "folder.py"):
        with pytest.raises(ValueError, match=f"There is no training file .*/{name}"):
            TrainingFile(tmp_path / name)
    with pytest.raises(ValueError, match=r"A training file is a Python file \(.py\), got .*job.ipynb"):
        TrainingFile(tmp_path / "job.ipynb")
