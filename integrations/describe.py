"""Configurations, scales and studies in words: what the terminal shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bo import Study, Trial
from bo.ports import ELSEWHERE
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
    """The trial's objective in the user's sign, or what became of it."""
    if trial.status == "finished" and trial.metrics:
        return f"{study.objective.shown(study.objective.value(trial.metrics)):.4f}"
    return trial.status


def status(study: Study, driver: str | None) -> str:
    """Where a study stands: counts, spend, what runs, the best so far."""
    counts: dict[str, int] = {}
    for trial in study.trials:
        key = trial.source if trial.source in ELSEWHERE else trial.status
        counts[key] = counts.get(key, 0) + 1
    limits = study.limits
    of_trials = f" of {limits.n_trials}" if limits.n_trials else ""
    of_budget = f" of {number(limits.budget)}" if limits.budget else ""
    lines = [
        f"{study.folder}: {len(study.trials)}{of_trials} trials"
        + (f" ({', '.join(f'{n} {status}' for status, n in counts.items())})" if counts else ""),
        f"  spent   {study.spent:.2f}{of_budget} target runs",
        f"  driver  {driver or 'none; windtunnel resume ' + str(study.folder) + ' goes on'}",
    ]
    for trial in study.running:
        step = f", step {trial.reports[-1].step}" if trial.reports else ""
        lines.append(
            f"  runs    trial {trial.id} ({trial.source}), {scale_words(trial.scale) or 'at the target'}{step}"
        )
    best = study.best()
    if best is None:
        lines.append("  best    none told at the target scale yet")
    else:
        lines.append(f"  best    {objective_words(study, best)} by trial {best.id}")
    failed = [trial for trial in study.trials if trial.status == "failed"]
    lines += [f"  failed  trial {trial.id}: {trial.error}" for trial in failed[-3:]]
    return "\n".join(lines)


def best_words(study: Study) -> str:
    best = study.best()
    if best is None:
        return f"{study.folder} has no told trial at its target scale yet."
    head = f"Best of {study.folder}: {objective_words(study, best)}, trial {best.id} ({best.source})"
    return f"{head}\n{config_table(best.config)}"


def summary(study: Study, how: str = "") -> str:
    """What a finished sweep found, what it cost, and what to do next; `how`: options that a resume has to repeat."""
    best, objective = study.best(), study.objective
    lines = ["", f"== {study.folder} " + "=" * max(3, 100 - len(str(study.folder)))]
    if best is None or best.metrics is None:
        lines.append("No trial has finished at the target scale yet.")
    else:
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
        baseline = _baseline(study)
        if baseline is not None and baseline.status == "finished" and baseline.metrics is not None:
            yours = objective.value(baseline.metrics)
            difference = f"{abs(yours - found):.4f} better than" if found < yours else "no better than"
            words = f"the best is {difference} your recipe"
            lines.append(f"Yours: {objective.shown(yours):.4f} (trial {baseline.id}); {words}.")
        elif baseline is not None:
            lines.append(f"Yours: trial {baseline.id} is {baseline.status}.")
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
        lines.append(f"       windtunnel recommend {study.folder}   gives the model's own choice, tried or not")
    return "\n".join(lines)


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
    told = [(study.objective.value(t.metrics), t) for t in led_to if t.status == "finished" and t.metrics]
    if told:
        (value, first), (least, _) = told[0], min(told, key=lambda pair: pair[0])
        words = f"  Without a random run, the first target run after them (trial {first.id}) gave "
        words += f"{study.objective.shown(value):.4f}"
        if (baseline := _baseline(study)) and baseline.status == "finished" and baseline.metrics:
            ahead = study.objective.value(baseline.metrics) - value
            words += f", {abs(ahead):.4f} {'better' if ahead > 0 else 'worse'} than your recipe"
        if len(told) > 1:
            words += f" and {value - least:.4f} from the best of {len(told)}"
        lines.append(words + ".")
    return lines


def _baseline(study: Study) -> Trial | None:
    return next((t for t in study.trials if t.source == "enqueued" and t.scale == study.top), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
