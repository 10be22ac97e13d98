import numpy as np
import pytest

from experiments.proposal_speed import PARTS, alone, history, main, measure, objective, optimum, report


def test_a_history_comes_nearer_the_optimum_on_every_second_run():
    X = history(64, 3, np.random.default_rng(0))
    away = np.linalg.norm(X - optimum(3), axis=1)
    assert X.shape == (64, 3)
    assert 0 <= X.min() < X.max() <= 1
    assert away[33::2].mean() < away[1:32:2].mean() < away[::2].mean()


def test_the_objective_is_least_at_the_optimum():
    X = np.concatenate([optimum(10)[None], np.random.default_rng(1).random((200, 10))])
    assert objective(X, np.random.default_rng(0)).argmin() == 0


def test_a_process_tells_and_asks_the_cycles_and_says_where_their_time_goes():
    row = alone("windtunnel", n=12, d=2, cycles=2)
    assert (row["cycles"], row["cut"]) == (2, False)
    assert row["bytes"] > 2**20
    assert set(row["parts"]) == set(PARTS)
    assert min(row["parts"].values()) > 0
    assert sum(row["parts"].values()) <= row["seconds"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what BoTorch imports
@pytest.mark.parametrize("method", ["optuna", "botorch", "overhead"])
def test_every_search_is_told_its_last_point_and_gives_the_next(method):
    *cycles, end = measure(method, n=12, d=2, cycles=2)
    assert [cycle["parts"] for cycle in cycles] == [{}] * 3  # the warm-up and two more
    assert min(cycle["seconds"] for cycle in cycles) > 0
    assert set(end) == {"bytes"}


def test_a_process_that_is_cut_before_its_first_cycle_has_no_time_and_bounds_the_ratio():
    cut = alone("overhead", n=12, d=2, cycles=2, limit=0.01)
    assert (cut["cut"], cut["seconds"]) == (True, None)
    mine = {**cut, "method": "windtunnel", "cut": False, "seconds": 6.0, "cycles": 2}
    assert "> 600 s" in (line := report([mine, {**cut, "method": "botorch"}]).splitlines()[-1])
    assert "< 0.01" in line


def test_unknown_rivals_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rivals", "hebo"])
    assert "--rivals may be optuna, botorch, got hebo" in capsys.readouterr().err
