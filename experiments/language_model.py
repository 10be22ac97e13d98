"""The main job: learning rate, batch size, schedule and data mixture of a small language model on real text.

    windtunnel run experiments/language_model.py [-- --scale full --corpus DIR --weights code=0.7,docs=0.3]

A decoder-only transformer reads bytes of several domains, in the proportions of the mixture. What counts is its
validation loss on the domains that `--weights` names, by default two of the six, so that the best mixture is not the
even one. The scale axes are parameters and tokens; a run at the default target takes about half a minute on one core.

`python -m experiments.language_model` builds the corpus and prints what is in it.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bo import WeightedSum
from bo.trial import Diverged
from experiments import corpus
from search_spaces import Fidelity, Integer, Mixture, Real, Scale, Schedule, Space, stable_until

if TYPE_CHECKING:
    from bo.worker import RunningTrial


@dataclass(frozen=True)
class Shape:
    """Of a transformer; `parameters` counts its matrices (the norms add 0.1%)."""

    width: int
    depth: int
    heads: int

    @property
    def parameters(self) -> int:
        return 12 * self.depth * self.width**2 + 2 * 256 * self.width


@dataclass(frozen=True)
class Recipe:
    """What is fixed in all runs at a `--scale`, and the rungs of its scale axes, of which the last are the target."""

    context: int  # bytes in a sequence
    batch: tuple[int, int]  # least and most sequences in a step
    shapes: Mapping[str, Shape]
    tokens: tuple[float, ...]


RECIPES: Mapping[str, Recipe] = {
    "small": Recipe(
        context=64,
        batch=(4, 32),
        shapes={
            "0.03M": Shape(32, 1, 2),
            "0.1M": Shape(56, 2, 4),
            "0.3M": Shape(88, 3, 4),
            "0.9M": Shape(128, 4, 4),
        },
        tokens=(40e3, 75e3, 150e3, 300e3),
    ),
    "full": Recipe(
        context=256,
        batch=(8, 64),
        shapes={
            "0.1M": Shape(56, 2, 4),
            "0.3M": Shape(88, 3, 4),
            "1M": Shape(128, 5, 4),
            "3M": Shape(200, 6, 5),
        },
        tokens=(1e6, 2e6, 5e6, 1e7),
    ),
}

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
WARMUP = 0.1  # of the steps; a default target run has 150 to 1170
PARTS = 5  # of a run; each ends with a report, the last with the result, and a checkpoint
WINDOWS = 128  # validation sequences a domain: 8 kB at the small scale
REPORT_EVERY = 8  # a report on the way takes every eighth of them


# ------------------------------------------------------------------------------------------ what the command line reads


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("experiments/language_model.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scale", choices=RECIPES, default="small", help="size of the target run (default: %(default)s)"
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="your own UTF-8 text, one folder a domain")
    parser.add_argument("--weights", metavar="DOMAIN=W,...", help="the domains whose validation loss counts")
    args = parser.parse_args(argv)
    if args.corpus is not None:
        args.corpus = args.corpus.absolute()
    args.domains = tuple(corpus.DOMAINS) if args.corpus is None else corpus.user_domains(args.corpus)
    args.weights = _weights(args.weights, args.domains, built_in=args.corpus is None)
    return args


def _weights(text: str | None, domains: tuple[str, ...], built_in: bool) -> dict[str, float]:
    """What the user says matters: domain -> weight. Left out: two built-in domains, or all of the user's own alike."""
    if text is None:
        chosen = ("headers", "reference") if built_in else domains
        return {name: 1 / len(chosen) for name in chosen}
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = item.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise ValueError(f"--weights needs DOMAIN=NUMBER,..., got {item!r}.") from None
        if name.strip() not in domains:
            raise ValueError(f"--weights names the domain {name.strip()!r}; the corpus has {list(domains)}.")
        if not 0 < weights[name.strip()] < math.inf:
            raise ValueError(f"--weights needs a number above 0 for {name.strip()}, got {number}.")
    return weights


ARGS = _arguments(sys.argv[1:])
RECIPE = RECIPES[ARGS.scale]

space = Space(
    lr=Real(1e-4, 1e-1, log=True),
    batch=Integer(*RECIPE.batch, log=True),
    schedule=Schedule("cosine", "linear", "rex", warmup=WARMUP, floor=0.0, shape=0.5, wsd={"decay": Real(0.1, 0.6)}),
    data=Mixture(*ARGS.domains, floor=0.01),
    fidelity=Fidelity(
        params={label: shape.parameters for label, shape in RECIPE.shapes.items()},
        tokens=RECIPE.tokens,
        target={"params": list(RECIPE.shapes)[-1], "tokens": RECIPE.tokens[-1]},
    ),
)
objective = WeightedSum({f"loss/{name}": weight for name, weight in ARGS.weights.items()})
budget = 14.0

# A recipe as one would write it down without tuning: the first trial, and what the summary compares with.
baseline = {
    "lr": 3e-3,
    "batch": 2 * RECIPE.batch[0],
    "schedule": {"family": "cosine", "warmup": WARMUP},
    "data": {name: 1 / len(ARGS.domains) for name in ARGS.domains},
}


def prepare() -> None:
    """Encode the corpus before any worker asks for it, and show what is in it."""
    print(corpus.open_corpus(ARGS.corpus).table(RECIPE.tokens[-1]))


# ------------------------------------------------------------------------------------------------------------- a run


def train(trial: RunningTrial) -> dict[str, float]:
    """One training run; on a CPU its losses depend on (config, scale, seed) alone, also when it was interrupted.

    Returns validation losses "loss/<domain>" in nats a byte, and "tokens_per_second". Raises Diverged when the training
    loss is not finite, or above its start on average over a part of the run.

    Where `trial.wanted` asks for results at fewer tokens, and the schedule has a stable phase, they come from copies of
    this run that leave it where the stable phase of the shorter run ends, and decay as that does (Haegele et al. 2024,
    arXiv 2405.18392). All that differs from the shorter run is the warm-up, which is as long as that of this one.
    """
    import torch  # not at the top: the command line needs only the space and the objective

    from experiments.transformer import Transformer, adamw, next_byte_loss

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small matrices, and other trials on the other cores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    text = corpus.open_corpus(ARGS.corpus)
    sources = [text.read(name, "train") for name in ARGS.domains]
    held_out = {name: validation_windows(text.read(name, "validation"), RECIPE.context) for name in ARGS.domains}

    config, shape = trial.config, RECIPE.shapes[trial.scale.label("params")]
    shares = np.array([config["data"][name] for name in ARGS.domains])  # (k,)
    batch, total = config["batch"], steps(trial.scale, config["batch"])
    print(f"corpus sha256 {text.sha256}; {shape.parameters:,} parameters, {total} steps on {device}", flush=True)

    model = Transformer(shape.width, shape.depth, shape.heads, RECIPE.context, trial.seed).to(device)
    optimizer = adamw(model, BETAS, WEIGHT_DECAY)

    def validate(every: int) -> dict[str, float]:
        with torch.no_grad():
            return {f"loss/{name}": next_byte_loss(model, rows[::every]).item() for name, rows in held_out.items()}

    def advance(first: int, last: int, of: int) -> list[float]:
        """Training losses of steps first .. last - 1 of a run of `of` steps."""
        losses = []
        for now in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = config["lr"] * config["schedule"].factor(now, of)
            loss = next_byte_loss(model, training_windows(sources, shares, batch, RECIPE.context, trial.seed, now))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged(f"The training loss is {losses[-1]} at step {now}.")
        return losses

    def branch(first: int, of: int) -> dict[str, float]:
        """What a copy of the run, at step `first`, ends with as a run of `of` steps."""
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        try:
            advance(first, of, of)
            return validate(1)
        except Diverged:
            return dict.fromkeys((f"loss/{name}" for name in held_out), math.nan)
        finally:
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])

    # Data order and learning rate are functions of the step; what is left to keep are the weights and their moments,
    # and what branches gave: the checkpoint may outlive a driver that had not heard of them.
    step, initial = 0, math.inf
    branched: list[tuple[float, dict[str, float]]] = []
    if (state := trial.load()) is not None:
        if state["corpus"] != text.sha256:
            raise RuntimeError(
                f"The checkpoint in {trial.folder} was trained on corpus {state['corpus']}, and this machine's is "
                f"{text.sha256}; give all machines the same package versions, or the same --corpus."
            )
        step, initial, branched = state["step"], state["initial"], list(state.get("branched", ()))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for tokens, metrics in branched:
            if any(scale["tokens"] == tokens for scale in trial.wanted):
                trial.branch(metrics, tokens=tokens)

    leaves = departures(config, trial.wanted)
    resumed_at, seconds = step, 0.0
    for end in (total * part // PARTS for part in range(1, PARTS + 1)):
        if end <= step:
            continue
        losses, first = [], step
        for leave, scale in [*((at, scale) for at, scale in leaves if step <= at <= end), (end, None)]:
            started = time.perf_counter()
            losses += advance(step, leave, total)
            seconds += time.perf_counter() - started
            step = leave
            if scale is not None:
                branched.append((scale["tokens"], branch(step, steps(scale, batch))))
                trial.branch(branched[-1][1], tokens=scale["tokens"])
        leaves = [(at, scale) for at, scale in leaves if at > end]
        mean = sum(losses) / len(losses)
        if first == 0:
            initial = losses[0]
        elif mean > initial:  # not asked of the first part: a low learning rate has hardly moved in it
            raise Diverged(f"The training loss is {mean:.2f} before step {end}, above its start of {initial:.2f}.")
        if step < total:
            trial.report(step * batch * RECIPE.context, validate(REPORT_EVERY) | {"train_loss": mean})  # tokens
        trial.save(
            {
                "step": step,
                "initial": initial,
                "branched": branched,
                "corpus": text.sha256,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
        )
    trained = (step - resumed_at) * batch * RECIPE.context
    return validate(1) | ({"tokens_per_second": trained / seconds} if trained else {})  # else: only validated again


def steps(scale: Scale, batch: int) -> int:
    return round(scale["tokens"] / (batch * RECIPE.context))


def departures(config: Mapping[str, Any], scales: Sequence[Scale]) -> list[tuple[int, Scale]]:
    """The step at which a run of each of the scales ends its stable phase, in order; none without a stable phase."""
    held, batch = stable_until(config), config["batch"]
    found = [] if held is None else [(math.floor(held * steps(scale, batch) + 1e-9), scale) for scale in scales]
    return sorted(found, key=lambda departure: departure[0])


def training_windows(
    sources: list[NDArray[np.uint8]], shares: NDArray[np.float64], batch: int, context: int, seed: int, step: int
) -> NDArray[np.uint8]:
    """The batch x (context + 1) bytes of a step, a function of its arguments alone.

    A domain gets its share of the sequences by systematic resampling (one uniform number a step, then equal distances):
    right on average and never off by a whole sequence, so that the mixture is what was asked for in short runs too.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    points = (rng.random() + np.arange(batch)) / batch
    domains = np.searchsorted(
        np.cumsum(shares)[:-1], points, side="right"
    )  # the last domain takes what rounding leaves
    places = rng.random(batch)
    rows = []
    for domain, place in zip(domains, places, strict=True):
        start = int(place * (len(sources[domain]) - context))
        rows.append(sources[domain][start : start + context + 1])
    return np.stack(rows)


def validation_windows(text: NDArray[np.uint8], context: int) -> NDArray[np.uint8]:
    """At most WINDOWS x (context + 1) bytes, evenly spread and without overlap: the same for every trial."""
    count = min(WINDOWS, (len(text) - 1) // context)
    starts = np.linspace(0, len(text) - context - 1, count).astype(int)
    return np.stack([text[start : start + context + 1] for start in starts])


if __name__ == "__main__":
    prepare()
