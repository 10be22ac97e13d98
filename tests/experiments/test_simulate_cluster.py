"""A slow acquisition keeps no worker waiting, in virtual time through the driver's own loop."""

import pytest

from experiments.simulate_cluster import slow


@pytest.mark.parametrize(("workers", "most"), [(64, None), (32, 1)])
def test_free_workers_wait_less_than_a_hundredth_of_their_time_for_a_proposal(tmp_path, workers, most):
    now = slow(workers, most, 25 * workers, False, tmp_path / "now")
    before = slow(workers, most, 25 * workers, True, tmp_path / "before")

    assert now["waiting_share_after_the_start"] < 0.01 < before["waiting_share_after_the_start"]
    assert now["p99_results_heard_late_by_s"] < 0.05 < before["p99_results_heard_late_by_s"]
