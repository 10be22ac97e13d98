"""A stopping rule ends the runs that are behind, by the reports of the study alone, and never where it cannot tell."""

import math
from dataclasses import replace

import pytest

from bo import Maximize, Minimize, Pareto, Report, Study, Trial, WeightedSum, checkpoint, journal, run, stopping
from bo.events import to_line
from bo.stopping import RULES, Halving
from bo.study import trial_folder
from search_spaces import Fidelity, Real, Scale, Space

LOSS = Minimize("loss")
SPACE = Space(lr=Real(0.0, 1.0))


def trial(id, *values, steps=None, scale=None, status="running"):
    steps = steps or range(1, len(values) + 1)
    reports = tuple(Report(step, {"loss": value}) for step, value in zip(steps, values, strict=True))
    scale = Scale() if scale is None else Scale({"params": scale})
    return Trial(id=id, config={}, scale=scale, seed=0, source="sobol", status=status, reports=reports)


def ends(rule, own, others, objective=LOSS):
    return rule.decide(own, [*others, own], objective)


def test_the_best_part_goes_on_at_a_rung_and_the_rest_ends():
    others = [trial(id, loss) for id, loss in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))]
    for eta, going_on in ((2.0, 3), (3.0, 2), (6.0, 1)):
        rule = Halving(first=1, eta=eta)
        own = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55)
        assert [ends(rule, trial(9, loss), others) for loss in own] == [rank >= going_on for rank in range(6)]


def test_equals_go_on_together():
    assert not ends(Halving(first=1), trial(9, 0.5), [trial(id, 0.5) for id in range(9)])


def test_rungs_are_where_they_are_said_to_be_and_each_judges_once():
    rule = Halving(first=4, eta=2)
    others = [trial(id, *[0.0] * 20) for id in range(5)]
    judged = [n for n in range(1, 21) if ends(rule, trial(9, *[1.0] * n), others)]
    assert judged == [4, 8, 16]


def test_the_first_report_past_a_rung_stands_for_it():
    others = [trial(id, 0.0, 0.0, steps=(5, 9)) for id in range(5)]
    assert ends(Halving(first=4), trial(9, 1.0, steps=(7,)), others)
    assert not ends(Halving(first=4), trial(9, 1.0, 1.0, steps=(5, 7)), others)


def test_a_run_without_reports_or_without_peers_goes_on():
    others = [trial(id, 0.0) for id in range(5)]
    assert not ends(Halving(first=1), trial(9), others)
    assert not ends(Halving(first=1), trial(9, 1.0), others[:2])
    assert ends(Halving(first=1), trial(9, 1.0), others[:3])
    assert not ends(Halving(first=1, peers=6), trial(9, 1.0), others)


def test_runs_at_another_scale_do_not_count():
    others = [trial(id, 0.0, scale=1e5) for id in range(5)]
    assert not ends(Halving(first=1), trial(9, 1.0, scale=1e6), others)
    assert ends(Halving(first=1), trial(9, 1.0, scale=1e5), others)


def test_not_a_number_is_the_worst():
    others = [trial(id, float(id)) for id in range(5)]
    assert ends(Halving(first=1), trial(9, math.nan), others)
    assert not ends(Halving(first=1), trial(9, 9.0), [trial(id, math.nan) for id in range(5)])


def test_the_objective_decides_what_is_better_and_reports_without_it_decide_nothing():
    others = [trial(id, 0.0) for id in range(5)]
    assert not ends(Halving(first=1), trial(9, 1.0), others, Maximize("loss"))
    assert ends(Halving(first=1), trial(9, -1.0), others, Maximize("loss"))
    assert not ends(Halving(first=1), trial(9, 1.0), others, WeightedSum({"loss": 1.0, "other": 1.0}))
    assert not ends(Halving(first=1), trial(9, 1.0), [replace(t, reports=(Report(1, {"x": 0.0}),)) for t in others])


def test_without_settings_the_rungs_follow_from_the_finished_runs_of_that_scale():
    others = [trial(id, *[0.0] * 10, status="finished") for id in range(3)]
    longer = trial(3, *[0.0] * 40, status="finished", scale=1e6)
    judged = [n for n in range(1, 12) if ends(Halving(), trial(9, *[1.0] * n), [*others, longer])]

    assert judged == [3, 6]
    assert not any(ends(Halving(), trial(9, *[1.0] * n), [trial(id, *[0.0] * 9) for id in range(5)]) for n in range(9))


@pytest.mark.parametrize("rule", [Halving(first=4), Halving(last=14)])
def test_a_report_between_rungs_costs_no_look_at_the_other_runs(rule):
    """The rungs are at 4 and 8, and at 4.2 and 8.4 steps."""
    for n in (1, 2, 3, 6, 7, 10, 11):
        assert not rule.decide(trial(9, *[1.0] * n), None, LOSS)


def test_steps_from_0_are_not_judged_at_the_end_either():
    others = [trial(id, 0.0, 0.0, 0.0, steps=(0, 5, 9), status="finished") for id in range(5)]
    assert ends(Halving(), trial(9, 1.0, 1.0, steps=(0, 5)), others)
    assert not ends(Halving(), trial(9, 1.0, 1.0, 1.0, steps=(0, 5, 9)), others)


def test_nothing_is_judged_at_the_end():
    others = [trial(id, *[0.0] * 8) for id in range(5)]
    judged = [n for n in range(1, 9) if ends(Halving(first=2, last=8), trial(9, *[1.0] * n), others)]
    assert judged == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 0}, "Halving needs first to be a whole number of at least 1, got 0"),
        ({"first": 1.5}, "Halving needs first to be a whole number of at least 1, got 1.5"),
        ({"last": 1}, "Halving needs last to be a whole number of at least 2, got 1"),
        ({"peers": None}, "Halving needs peers to be a whole number of at least 1, got None"),
        ({"eta": 1}, "Halving needs a finite eta above 1, got 1"),
        ({"eta": math.nan}, "Halving needs a finite eta above 1, got nan"),
        ({"first": 8, "last": 8}, "Halving needs first to be below last=8, got 8"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Halving(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("median", "stopping must be one of halving, or a dictionary with such a name, got 'median'"),
        ({"first": 3}, "stopping must be one of halving, or a dictionary with such a name, got {'first': 3}"),
        (3, "stopping must be one of halving"),
        ({"name": "halving", "last": 3, "grace": 1}, r"The rule 'halving' has the settings .*, got \['grace'\]"),
    ],
)
def test_a_rule_that_is_none_is_refused_and_the_rules_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        Study.create(tmp_path / "study", SPACE, objective=LOSS, policy="sobol", stopping=given)
    assert not (tmp_path / "study").exists()


def test_a_front_has_no_rule(tmp_path):
    with pytest.raises(ValueError, match="Halving goes by one number, and a Pareto objective has none"):
        Study.create(tmp_path, SPACE, objective=Pareto(LOSS, Minimize("time")), policy="sobol", stopping="halving")


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_kept_with_the_study(tmp_path, name):
    with Study.create(tmp_path, SPACE, objective=LOSS, policy="sobol", stopping=name) as study:
        assert study.stopping == RULES[name]()
    assert Study.open(tmp_path).stopping == study.stopping
    assert stopping.make(stopping.to_json(study.stopping)) == study.stopping
    with Study.open(tmp_path).fork(tmp_path / "fork") as fork:
        assert fork.stopping == study.stopping


def test_a_study_is_not_opened_with_another_rule(tmp_path):
    first = {"name": "halving", "first": 3}
    arguments = {"objective": LOSS, "policy": "sobol"}
    Study.open_or_create(tmp_path, SPACE, stopping=first, **arguments).close()

    assert Study.open_or_create(tmp_path, SPACE, stopping=first, **arguments).stopping == Halving(first=3)
    assert Study.open_or_create(tmp_path, SPACE, **arguments).stopping == Halving(first=3)
    with pytest.raises(ValueError, match="was made with stopping Halving"):
        Study.open_or_create(tmp_path, SPACE, stopping="halving", **arguments)


def test_a_study_without_a_rule_reads_as_before_and_stops_nothing(tmp_path):
    with Study.create(tmp_path, SPACE, objective=LOSS, policy="sobol") as study:
        (asked,) = study.ask(1)
        study.report(asked.id, 1, {"loss": 9.0})
        assert study.stopping is None
        assert not study.should_stop(asked.id)
    assert b"stopping" not in (tmp_path / "journal.jsonl").read_bytes()


def train(trial):
    for step in range(1, 9):
        trial.report(step, {"loss": trial.config["lr"] + 1 / step})
    return {"loss": trial.config["lr"]}


def test_runs_that_are_behind_end_early_and_the_best_is_found(tmp_path):
    with Study.create(
        tmp_path, SPACE, objective=LOSS, policy="sobol", stopping={"name": "halving", "first": 2, "last": 8}
    ) as study:
        run(study, train, n_trials=16)
        statuses = [trial.status for trial in study.trials]
        lengths = {trial.reports[-1].step for trial in study.trials if trial.status == "stopped"}
        best = min(study.trials, key=lambda trial: trial.config["lr"])

        assert statuses[:3] == ["finished"] * 3
        assert 4 <= statuses.count("stopped") <= 12
        assert lengths <= {2, 4}
        assert study.best() == best


def test_a_stop_that_a_killed_driver_did_not_carry_out_is_carried_out(tmp_path):
    with Study.create(
        tmp_path, SPACE, objective=LOSS, policy="sobol", stopping={"name": "halving", "first": 1}
    ) as study:
        for asked in study.ask(4):
            study.report(asked.id, 1, {"loss": float(asked.id)})
    with Study.open(tmp_path) as study:
        run(study, train, n_trials=4)
        assert [trial.status for trial in study.trials][3] == "stopped"
        assert len(study.trials[3].reports) == 1


def test_a_run_is_judged_by_those_that_came_before_it_also_when_it_reports_again_or_the_study_is_opened_again(tmp_path):
    rule = {"name": "halving", "first": 1}
    with Study.create(tmp_path, SPACE, objective=LOSS, policy="sobol", stopping=rule) as study:
        for asked, loss in zip(study.ask(5), (9.0, 1.0, 2.0, 3.0, 4.0), strict=True):
            study.report(asked.id, 1, {"loss": loss})
        decided = [study.should_stop(trial.id) for trial in study.trials]
        assert decided == [False, False, False, True, True], "the first three had no peers"
        study.retry(0, "signal 9")
        study.report(0, 1, {"loss": 9.0})
        assert [study.should_stop(trial.id) for trial in study.trials] == decided

    again = Study.open(tmp_path)
    assert [again.should_stop(trial.id) for trial in again.trials] == decided


def test_a_stop_that_is_carried_out_on_a_resume_leaves_no_checkpoint_behind(tmp_path):
    rule = {"name": "halving", "first": 1}
    with Study.create(tmp_path, SPACE, objective=LOSS, policy="sobol", stopping=rule) as study:
        for asked in study.ask(4):
            checkpoint.save(trial_folder(tmp_path, asked.id), 1)
            study.report(asked.id, 1, {"loss": float(asked.id)})
        run(study, lambda trial: {"loss": 1.0}, n_trials=4)
        assert study.trials[3].status == "stopped"
    assert [bool(list(trial_folder(tmp_path, id).glob("*.zip"))) for id in range(4)] == [True, True, True, False]


def test_a_run_that_is_stopped_with_nan_is_a_diverged_one(tmp_path):
    with Study.create(tmp_path, SPACE, objective=LOSS, policy="sobol") as study:
        one, other = study.ask(2)
        study.report(one.id, 1, {"loss": math.nan})
        study.report(other.id, 1, {"loss": 1.0, "norm": math.nan})

        assert study.stop(one.id).status == "diverged"
        assert study.stop(other.id).status == "stopped"


def test_proxies_are_judged_among_proxies(tmp_path):
    space = Space(
        lr=Real(0.0, 1.0),
        fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6,), target={"params": 1e6, "tokens": 1e6}),
    )
    with Study.create(
        tmp_path, space, objective=LOSS, policy="sobol", stopping={"name": "halving", "first": 1}
    ) as study:
        for lr in (0.1, 0.2, 0.3):
            study.enqueue({"lr": lr}, {"params": 1e5, "tokens": 1e6})
        study.enqueue({"lr": 0.9})
        study.enqueue({"lr": 0.9}, {"params": 1e5, "tokens": 1e6})
        stopped = []
        for asked in study.ask(5):
            study.report(asked.id, 1, {"loss": asked.config["lr"]})
            stopped.append(study.should_stop(asked.id))
        assert stopped == [False] * 4 + [True]


# ------------------------------------------------------------------------------- what a run that was ended costs

SIZES = Fidelity(params=(1e5, 1e6), tokens=(1e6,), target={"params": 1e6, "tokens": 1e6})
EIGHT = {"name": "halving", "first": 2, "last": 8}


def of_study(folder, space=SPACE, **settings):
    return Study.create(folder, space, objective=LOSS, policy="sobol", **settings)


def test_a_run_that_was_ended_costs_the_share_that_it_made_and_the_budget_goes_further(tmp_path):
    with of_study(tmp_path / "whole") as whole, of_study(tmp_path / "halved", stopping=EIGHT) as halved:
        for study in (whole, halved):
            run(study, train, budget=12)
            assert 11 < study.spent <= 12 + 1e-9
        assert len(whole.trials) == 12
        assert len(halved.trials) >= 16
        ended = [trial for trial in halved.trials if trial.status == "stopped"]
        assert [trial.cost for trial in ended] == [trial.reports[-1].step / 8 for trial in ended]
        assert halved.best().metrics["loss"] <= whole.best().metrics["loss"]


def test_what_was_spent_is_the_same_wherever_the_study_is_opened_again(tmp_path):
    spent = {}
    with of_study(tmp_path / "study", stopping=EIGHT) as study:
        run(study, train, n_trials=16, watch=lambda *_: spent.update({study.seen: study.spent}))
        assert "stopped" in {trial.status for trial in study.trials}
        assert study.spent == pytest.approx(sum(trial.cost for trial in study.trials))
    lines = (tmp_path / "study" / journal.NAME).read_bytes().splitlines(keepends=True)
    again = tmp_path / "again"
    again.mkdir()
    for seen, then in spent.items():
        (again / journal.NAME).write_bytes(b"".join(lines[:seen]))
        assert Study.open(again).spent == then


def test_a_run_ended_by_a_driver_that_did_not_write_shares_counts_in_full(tmp_path):
    with of_study(tmp_path) as study:
        first, second = study.ask(2)
        study.stop(first.id, share=0.25)
        study.stop(second.id, share=0.25)
    path = tmp_path / journal.NAME
    events, _ = journal.read(path)
    assert Study.open(tmp_path).spent == 0.5
    assert events[-1].pop("share") == 0.25
    old = [to_line(each["n"], each["at"], {k: v for k, v in each.items() if k not in ("n", "at")}) for each in events]
    path.write_bytes(b"".join(old))
    assert [trial.cost for trial in Study.open(tmp_path).trials] == [0.25, 1.0]


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, True, "half"])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    with of_study(tmp_path) as study:
        (asked,) = study.ask(1)
        with pytest.raises(ValueError, match="share must be a number from 0 to 1, got"):
            study.stop(asked.id, share=share)
        assert study.trial(asked.id).status == "running"


@pytest.mark.parametrize(
    ("own", "lengths", "last", "share"),
    [
        ([2, 4], [8, 8], None, 0.5),
        ([2, 4], [8, 8.5], None, 0.5),
        ([2, 4], [8, 16], None, None),  # nobody knows how long this one is
        ([2, 4], [8], 100, 0.04),  # what was said goes before what ran
        ([2, 4], [], 16, 0.25),
        ([2, 4], [], None, None),
        ([], [8], None, None),
        ([8], [8], None, None),
        ([0], [9], None, 1 / 9),  # steps from 0 on
        ([0], [0], None, None),
    ],
)
def test_the_share_is_told_from_finished_runs_of_the_scale_or_from_the_rule(own, lengths, last, share):
    others = [trial(id, 0.0, steps=[length], status="finished") for id, length in enumerate(lengths)]
    others += [trial(7, 0.0, steps=[3]), trial(8, 0.0, steps=[3], scale=1e5, status="finished")]
    mine = trial(9, *[0.0] * len(own), steps=own)
    assert stopping.share(mine, [*others, mine], last) == share


def test_steps_that_are_counted_from_0_are_so_in_all_runs():
    whole = trial(0, *[0.0] * 10, steps=list(range(10)), status="finished")
    assert stopping.share(trial(1, 0.0, 0.0, 0.0, steps=[0, 1, 2]), [whole]) == 0.3
    assert stopping.share(trial(1, 0.0, steps=[0]), [trial(0, 0.0, 0.0, steps=[0, 1], status="finished")]) == 0.5


def test_a_trunk_that_was_ended_counts_in_full_since_its_branches_cost_too():
    others = [trial(0, 0.0, steps=[8], status="finished")]
    assert stopping.share(trial(9, 0.0, steps=[4]), others) == 0.5
    assert stopping.share(replace(trial(9, 0.0, steps=[4]), wanted=(Scale({"params": 1e5}),)), others) is None


def test_what_the_rule_was_told_of_the_length_of_a_run_holds_at_the_top_scale(tmp_path):
    with of_study(tmp_path, Space(lr=Real(0.0, 1.0), fidelity=SIZES), stopping=EIGHT) as study:
        study.enqueue({"lr": 0.5}, {"params": 1e5, "tokens": 1e6})
        study.enqueue({"lr": 0.5})
        small, large = study.ask(2)
        for asked in (small, large):
            study.report(asked.id, 2, {"loss": 1.0})
            study.stop(asked.id)
        assert [trial.cost for trial in study.trials] == [small.cost, 0.25]
