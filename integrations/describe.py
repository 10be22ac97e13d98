"""Configurations, scales and studies in words: what the terminal shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bo import AtMost, Function, Maximize, Minimize, Pareto, Study, Trial, WeightedSum
from bo.objective import Objective, Single
from bo.ports import ELSEWHERE, Plan, Recommendation
from search_spaces import Curve, Scale, SwitchedMixture


def number(value: float) -> str:
    """A number with four significant digits, without noise: 0.0021, 3e+05, 12."""
    return f"{value:.4g}"


def quantity(value: float) -> str:
    """A count in thousands, millions, billions: 75k, 1.2M, 20B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return number(value)


def scale_words(scale: Scale) -> str:
    """`0.9M params, 300k tokens`; empty for a study without a fidelity."""
    words = []
    for axis, value in scale.items():
        label = scale.label(axis)
        words.append(f"{quantity(value) if _is_number(label) else label} {axis}")
    return ", ".join(words)


def value_words(value: Any) -> str:
    """One value of a configuration: a schedule, a mixture or a scalar."""
    if isinstance(value, Curve):
        inner = ", ".join(f"{name} {value_words(getattr(value, name))}" for name in value.settings())
        return f"{value.family} ({inner})" if inner else value.family
    if isinstance(value, tuple):
        return "/".join(map(value_words, value)) if len(value) <= 5 else f"{len(value)} numbers"
    if isinstance(value, SwitchedMixture):
        return f"{value_words(value.first)}; from {100 * value.switch:.0f}% of the run {value_words(value.last)}"
    if isinstance(value, Mapping):
        shares = sorted(value.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares)
    return number(value) if isinstance(value, float) else str(value)


def config_line(config: Mapping[str, Any]) -> str:
    """A configuration on one line, mixtures by their largest shares."""
    words = []
    for name, value in config.items():
        if isinstance(value, SwitchedMixture):
            words.append(f"{name} {_largest(value.first)}, then {_largest(value.last)}")
        elif isinstance(value, Mapping):
            words.append(f"{name} {_largest(value)}")
        elif isinstance(value, Curve):
            words.append(value.family)
        else:
            words.append(f"{name} {value_words(value)}")
    return "  ".join(words)


def _largest(shares: Mapping[str, float]) -> str:
    """The three largest shares of a mixture, in percent."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return "+".join(f"{source}:{100 * share:.0f}" for source, share in ranked)


def config_table(config: Mapping[str, Any], indent: str = "  ") -> str:
    """A configuration with a line a parameter."""
    width = max((len(name) for name in config), default=0)
    return "\n".join(f"{indent}{name:<{width}}  {value_words(value)}" for name, value in config.items())


def objective_words(study: Study, trial: Trial) -> str:
    """The trial's objectives in the user's sign and the limits it breaks, or what became of it."""
    if trial.status != "finished" or not trial.metrics:
        return trial.status
    parts, metrics = study.objective.parts, trial.metrics
    values = zip(parts, study.objective.values(metrics), strict=True)
    words = " / ".join(f"{part.shown(value):.4f}" for part, value in values)
    broken = [limit for limit in study.objective.subject_to if not limit.holds(metrics)]
    if not broken:
        return words
    how = ", ".join(
        f"{limit.metric} {number(metrics[limit.metric])} {'>' if isinstance(limit, AtMost) else '<'} "
        f"{number(limit.limit)}"
        for limit in broken
    )
    return f"{words} ({how})"


def found_words(study: Study) -> str | None:
    """The best, or the size of the front, in a few words; None while there is neither."""
    if isinstance(study.objective, Pareto):
        many = len(study.front())
        words = f"front   {many} {'trial' if many == 1 else 'trials'}, hypervolume {number(study.hypervolume())}"
        return words if many else None
    if isinstance(study.objective, Function) and study.objective.lacking:
        return f"best    unknown, the objective {study.objective.lacking} is not at hand"
    best = study.best()
    return None if best is None else f"best    {objective_words(study, best)} by trial {best.id}"


def nothing_words(study: Study) -> str:
    """Why there is no best trial and no front."""
    limits = study.objective.subject_to
    told = any(t.status == "finished" and t.scale == study.top and t.source not in ELSEWHERE for t in study.trials)
    return "none within the limits yet" if limits and told else "none told at the target scale yet"


def front_lines(study: Study) -> list[str]:
    """A line for each trial of the front: its objectives, what it is and its configuration."""
    trials = sorted(study.front(), key=lambda trial: study.objective.values(trial.metrics or {}))
    return [f"  {objective_words(study, trial)}  trial {trial.id}  {config_line(trial.config)}" for trial in trials]


def counts_words(study: Study) -> str:
    """What has become of how many trials; of runs made elsewhere, how they came here."""
    kinds = Counter(trial.source if trial.source in ELSEWHERE else trial.status for trial in study.trials)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def status(study: Study, driver: str | None, how: str = "") -> str:
    """Where a study stands: counts, spend, what runs, the best so far; `how`: options that a resume has to repeat."""
    counts = counts_words(study)
    limits = study.limits
    of_trials = f" of {limits.n_trials}" if limits.n_trials else ""
    of_budget = f" of {number(limits.budget)}" if limits.budget else ""
    lines = [
        f"{study.folder}: {len(study.trials)}{of_trials} trials" + (f" ({counts})" if counts else ""),
        f"  spent   {study.spent:.2f}{of_budget} target runs",
        f"  driver  {driver or f'none; windtunnel resume {study.folder}{how} goes on'}",
    ]
    for trial in study.running:
        step = f", step {trial.reports[-1].step}" if trial.reports else ""
        lines.append(
            f"  runs    trial {trial.id} ({trial.source}), {scale_words(trial.scale) or 'at the target'}{step}"
        )
    kind = "front" if isinstance(study.objective, Pareto) else "best"
    lines.append(f"  {found_words(study) or f'{kind:<7} {nothing_words(study)}'}")
    failed = [trial for trial in study.trials if trial.status == "failed"]
    lines += [f"  failed  trial {trial.id}: {trial.error}" for trial in failed[-3:]]
    return "\n".join(lines)


def open_words(found: Recommendation) -> list[str]:
    """What is left open about a recommended configuration: where the best of each number lies, and of each choice."""
    rows = {path: f"{number(low)} to {number(high)}" for path, (low, high) in found.intervals.items()}
    for path, options in found.options.items():
        rows[path] = ", ".join(f"{option} {share:.0%}" for option, share in list(options.items())[:3])
    if not rows:
        return []
    width = max(map(len, rows))
    return ["  the best lies, with 90%, at", *(f"    {path:<{width}}  {words}" for path, words in rows.items())]


def plan_words(plan: Plan) -> str:
    """What is going to be run where, and what for."""
    targets = "target runs for as long as they are wanted"
    if plan.targets is not None:
        targets = f"{plan.targets} target run{'s' if plan.targets != 1 else ''}"
    if not plan.proxies:
        return f"Plan: {targets}, no proxies. {plan.why}"
    n = len(plan.proxies)
    lines = [f"Plan: {n} prox{'ies' if n > 1 else 'y'} for {plan.cost:.2f} target runs in all, then {targets}."]
    for scale, runs in Counter(plan.proxies).items():
        lines.append(f"  {runs:>4} at {scale_words(scale)}")
    lines.append(
        f"  They are expected to save about {number(round(plan.saved, 1))} target runs; results may change the plan."
    )
    return "\n".join(lines)


def best_words(study: Study) -> str:
    if isinstance(study.objective, Pareto):
        if not (front := front_lines(study)):
            return f"{study.folder} has no front: {nothing_words(study)}."
        return "\n".join([f"Front of {study.folder} ({objective_name(study.objective)}):", *front])
    best = study.best()
    if best is None and study.objective.subject_to:
        return f"{study.folder} has no best trial: {nothing_words(study)}."
    if best is None:
        return f"{study.folder} has no told trial at its target scale yet."
    head = f"Best of {study.folder}: {objective_words(study, best)}, trial {best.id} ({best.source})"
    return f"{head}\n{config_table(best.config)}"


def summary(study: Study, how: str = "") -> str:
    """What a finished sweep found, what it cost, and what to do next; `how`: options that a resume has to repeat."""
    lines = ["", f"== {study.folder} " + "=" * max(3, 100 - len(str(study.folder)))]
    objective = study.objective
    lines += _front_summary(study, objective) if isinstance(objective, Pareto) else _best_summary(study, objective)
    lines += _proxy_words(study)
    counts = [f"{len(study.trials)} trials", f"{study.spent:.2f} target runs spent"]
    for status in ("diverged", "stopped", "failed", "running"):
        if n := sum(trial.status == status for trial in study.trials):
            counts.append(f"{n} {'still to finish' if status == 'running' else status}")
    lines.append(f"In all: {', '.join(counts)}.")
    if failed := [trial for trial in study.trials if trial.status == "failed"]:
        lines.append(f"  the last failure: trial {failed[-1].id}: {failed[-1].error}")
    lines.append(
        f"Files: {study.folder}/journal.jsonl holds every trial, {study.folder}/trials/ its checkpoints and logs."
    )
    totals = [("--budget", study.limits.budget), ("--trials", study.limits.n_trials)]
    if more := " ".join(f"{option} {math.ceil(1.5 * total)}" for option, total in totals if total):
        lines.append(f"Next:  windtunnel resume {study.folder} {more}{how}   searches on from here")
        if isinstance(objective, Pareto):
            lines.append(f"       windtunnel best {study.folder}   shows the front again")
        else:
            lines.append(f"       windtunnel recommend {study.folder}   gives the model's own choice, tried or not")
        lines.append(f"       windtunnel report {study.folder}   has all of it as a page for the browser")
    return "\n".join(lines)


def _best_summary(study: Study, objective: Single) -> list[str]:
    """The best trial, what was predicted of it, and what it gains over the user's recipe."""
    best = study.best()
    if best is None or best.metrics is None:
        if objective.subject_to:
            return [f"No best trial: {nothing_words(study)}."]
        return ["No trial has finished at the target scale yet."]
    lines = []
    found = objective.value(best.metrics)
    where = scale_words(best.scale)
    lines.append(f"Best: {objective.shown(found):.4f}, trial {best.id}" + (f" at {where}" if where else ""))
    lines.append(config_table(best.config))
    lines.append("  metrics   " + "  ".join(f"{name} {number(best.metrics[name])}" for name in objective.metrics))
    if best.predicted:
        mean, low, high = (objective.shown(best.predicted[key]) for key in ("mean", "low", "high"))
        low, high = min(low, high), max(low, high)
        lines.append(
            f"  predicted {mean:.4f} (90% interval {low:.4f} to {high:.4f}), measured {objective.shown(found):.4f}"
        )
    lines += _recommended_words(study, objective, best)
    baseline = recipe(study)
    if baseline is not None and baseline.metrics is not None and not objective.feasible(baseline.metrics):
        lines.append(f"Yours: {objective_words(study, baseline)}, trial {baseline.id}, breaks the limits.")
    elif baseline is not None and baseline.status == "finished" and baseline.metrics is not None:
        yours = objective.value(baseline.metrics)
        difference = f"{abs(yours - found):.4f} better than" if found < yours else "no better than"
        words = f"the best is {difference} your recipe"
        lines.append(f"Yours: {objective.shown(yours):.4f} (trial {baseline.id}); {words}.")
    elif baseline is not None:
        lines.append(f"Yours: trial {baseline.id} is {baseline.status}.")
    return lines


def _recommended_words(study: Study, objective: Single, best: Trial) -> list[str]:
    """Which of the trials the model believes best; that measured best may have been lucky. It loads torch."""
    found = study.recommend(study.top, tried=True)
    if found.trial is None or found.mean is None or found.low is None or found.high is None:
        return []
    low, high = sorted((objective.shown(found.low), objective.shown(found.high)))
    expected = f"{objective.shown(found.mean):.4f} (90% interval {low:.4f} to {high:.4f})"
    if found.trial == best.id:
        return [f"Recommended: the same trial; the model expects {expected} run again."]
    words = f"Recommended: trial {found.trial}; the model expects {expected} run again; the best may have been luck."
    return [words, config_table(found.config)]


def _front_summary(study: Study, objective: Pareto) -> list[str]:
    """The front and its volume."""
    if not (front := front_lines(study)):
        return [f"No front: {nothing_words(study)}."]
    return [f"Front ({objective_name(objective)}), hypervolume {number(study.hypervolume())}:", *front]


def objective_name(objective: Objective) -> str:
    """What is looked for: the metrics, and which way is better."""
    if isinstance(objective, Pareto):
        return " / ".join(map(objective_name, objective.parts))
    if isinstance(objective, WeightedSum):
        return " + ".join(f"{number(w)} {name}" for name, w in objective.weights.items())
    if isinstance(objective, (Minimize, Maximize)):
        return f"{type(objective).__name__.lower()} {objective.metric}"
    return str(objective)


def _proxy_words(study: Study) -> list[str]:
    """What the proxies cost, and what they bought: how good the first target run after them was."""
    proxies = [t for t in study.trials if t.scale != study.top and t.source not in ELSEWHERE]
    led_to = [t for t in study.trials if t.source == "ladder/target"]
    if not proxies:
        return []
    cost = sum(trial.cost for trial in proxies)
    lines = [
        f"Proxies: {len(proxies)} small runs cost {cost:.2f} target runs in all ({number(cost / len(proxies))} each)."
    ]
    objective = study.objective
    if isinstance(objective, Pareto):  # which of the runs after them was best, no number says
        return lines
    finished = [(t, t.metrics) for t in led_to if t.status == "finished" and t.metrics]
    told = [(objective.value(metrics), t) for t, metrics in finished if objective.feasible(metrics)]
    if told:
        (value, first), (least, _) = told[0], min(told, key=lambda pair: pair[0])
        words = f"  Without a random run, the first target run after them (trial {first.id}) gave "
        words += f"{objective.shown(value):.4f}"
        if (baseline := recipe(study)) and baseline.status == "finished" and baseline.metrics:
            ahead = objective.value(baseline.metrics) - value
            words += f", {abs(ahead):.4f} {'better' if ahead > 0 else 'worse'} than your recipe"
        if len(told) > 1:
            words += f" and {value - least:.4f} from the best of {len(told)}"
        lines.append(words + ".")
    return lines


def recipe(study: Study) -> Trial | None:
    """The run of the user's own recipe at the top scale, which all else is compared with."""
    return next((t for t in study.trials if t.source == "enqueued" and t.scale == study.top), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
