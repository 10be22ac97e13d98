"""What a proposal costs: CPU seconds of tell + ask after n runs, next to Optuna's GP and BoTorch's exact GP.

    python -m experiments.proposal_speed [--sizes 50,200,500,1000,2000] [--rivals optuna,botorch] [--cycles 20] [--save]

Every line is a fresh process with one thread: n runs of a smooth, noisy function are loaded (half of a Sobol sequence,
half near its optimum, as a search leaves them), one cycle warms up, and the CPU time of the next cycles is averaged,
refits included. Windtunnel goes through `Study` with its journal on the disk; Optuna keeps its trials in memory. A
process is cut after ten minutes; what it had finished by then counts, and without a whole cycle it is shown as > 600.
The aim is a third of each rival up to n = 2,000, ten seconds and 2 GiB at n = 10,000, one second for a mixture of six
sources with a rate and a schedule.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from search_spaces import Mixture, Real, Schedule, Space

Array: TypeAlias = npt.NDArray[np.float64]
#: One cycle: the result of the point before (None in the first cycle) -> the next point (d,).
Step: TypeAlias = Callable[[float | None], Array]

LIMIT = 600.0  # seconds of a process
NOISE = 0.01  # standard deviation of a run
DIMENSIONS = 10
SIZES = (50, 200, 500, 1000, 2000)
DIMENSIONS_AT = 200  # runs at which the growth with d is measured
OTHER_DIMENSIONS = (2, 5, 20, 40)
LARGE, LARGE_SECONDS, LARGE_BYTES = 10_000, 10.0, 2 * 2**30
MIXTURE_SIZES, MIXTURE_SECONDS = (14, 40, 100), 1.0
#: Where the time of a proposal goes: what is timed, and the functions whose time it is.
PARTS = {
    "data": [("bo.dataset", "from_history")],
    "fit": [("bo.policies.posterior", "fit")],
    "acquisition": [("bo.policies.posterior", "maximise")],
    "journal": [("bo.study", "Study._append")],
}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
RESULTS = Path(__file__).parent / "results" / "proposal_speed.json"


def objective(X: Array, rng: np.random.Generator) -> Array:
    """n x d points to n noisy values, least at `optimum`: a bowl that is steep in few coordinates, and gentle waves."""
    d = X.shape[1]
    steepness = 4.0 / np.arange(1, d + 1)
    away = X - optimum(d)
    values = (steepness * (away**2 + 0.02 * (1 - np.cos(6 * np.pi * away)))).sum(axis=1)
    return np.asarray(values + NOISE * rng.standard_normal(len(X)))


def optimum(d: int) -> Array:
    return 0.2 + 0.6 * np.modf((1 + np.arange(d)) * (math.sqrt(5) - 1) / 2)[0]


def history(n: int, d: int, rng: np.random.Generator) -> Array:
    """n x d points as a search leaves them: half a Sobol sequence, every second one nearer and nearer the optimum."""
    from scipy.stats import qmc

    X: Array = qmc.Sobol(d, rng=rng).random(2 ** math.ceil(math.log2(n)))[:n]
    near = np.arange(1, n, 2)
    spread = 0.3 * (1 - near / n)[:, None] + 0.02
    X[near] = np.clip(optimum(d) + spread * rng.standard_normal((len(near), d)), 0, 1)
    return X


# ------------------------------------------------------------------------------------------------------ the searches


def flat(d: int) -> Space:
    axes: dict[str, Any] = {f"x{i}": Real(0.0, 1.0) for i in range(d)}
    return Space(**axes)


def mixed() -> Space:
    return Space(data=Mixture(*"abcdef"), lr=Real(1e-4, 1e-2, log=True), schedule=Schedule("cosine", "linear", "wsd"))


def windtunnel(space: Space, X: Array, y: Array, folder: Path, policy: str = "bayes") -> Step:
    """The study is told X as configurations that were enqueued, asked for and run."""
    from bo import Minimize, Study

    study = Study.create(folder / "study", space, objective=Minimize("loss"), policy=policy)
    for config in space.decode_all(X):
        study.enqueue(config)
    for trial, value in zip(study.ask(len(X)), y.tolist(), strict=True):
        study.tell(trial.id, {"loss": value})

    def step(value: float | None) -> Array:
        if value is not None:
            study.tell(len(study.trials) - 1, {"loss": value})
        (trial,) = study.ask()
        if trial.note and trial.predicted is None:
            raise RuntimeError(f"Trial {trial.id} is not the model's: {trial.note}")
        return space.encode(trial.config)

    return step


def optuna(X: Array, y: Array) -> Step:
    import optuna as library

    library.logging.set_verbosity(library.logging.ERROR)
    axes: dict[str, Any] = {f"x{i}": library.distributions.FloatDistribution(0.0, 1.0) for i in range(X.shape[1])}
    study = library.create_study(sampler=library.samplers.GPSampler(seed=0, n_startup_trials=10))
    for x, value in zip(X.tolist(), y.tolist(), strict=True):
        params = dict(zip(axes, x, strict=True))
        study.add_trial(library.trial.create_trial(params=params, distributions=axes, value=value))
    asked: list[Any] = []

    def step(value: float | None) -> Array:
        if value is not None:
            study.tell(asked[-1], value)
        asked.append(study.ask(axes))
        return np.array([asked[-1].params[name] for name in axes])

    return step


def botorch(X: Array, y: Array) -> Step:
    """The loop of BoTorch's tutorials: an exact GP fitted from scratch, log-EI, 10 restarts from 512 raw points."""
    import torch
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    inputs, values = torch.tensor(X), -torch.tensor(y)[:, None]
    bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, X.shape[1])

    def step(value: float | None) -> Array:
        nonlocal values, inputs
        if value is not None:
            values = torch.cat([values, values.new_tensor([[-value]])])
        model = SingleTaskGP(inputs, values, outcome_transform=Standardize(m=1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        acquisition = LogExpectedImprovement(model, best_f=values.max())
        found, _ = optimize_acqf(acquisition, bounds=bounds, q=1, num_restarts=10, raw_samples=512)
        inputs = torch.cat([inputs, found.detach()])
        return np.asarray(found[0].detach().numpy())

    return step


def search(method: str, n: int, d: int, folder: Path, rng: np.random.Generator) -> tuple[Step, int]:
    """A search with n runs told, and its number of coordinates."""
    if method == "mixture":
        space = mixed()
        d = len(space.columns)
        X = space.encode_all(space.sample(rng, n))
        return windtunnel(space, X, objective(X, rng), folder), d
    X = history(n, d, rng)
    y = objective(X, rng)
    if method == "windtunnel":
        return windtunnel(flat(d), X, y, folder), d
    if method == "overhead":
        return windtunnel(flat(d), X, y, folder, policy="sobol"), d
    return {"optuna": optuna, "botorch": botorch}[method](X, y), d


# ------------------------------------------------------------------------------------------- measuring, in a process


def measure(method: str, n: int, d: int, cycles: int) -> Iterator[dict[str, Any]]:
    """CPU seconds of every cycle, those of its parts among them, the first one the warm-up; at last the peak memory.

    The overhead is that of the study and of a policy without a model.
    """
    rng = np.random.default_rng(n + d)
    with TemporaryDirectory() as folder:
        step, d = search(method, n, d, Path(folder), rng)
        spent = timed(PARTS) if method in ("windtunnel", "mixture") else {}
        value: float | None = None
        for _ in range(1 + cycles):
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.process_time()
            x = step(value)
            total = time.process_time() - start
            value = float(objective(x[None], rng)[0])
            yield {"seconds": total, "parts": dict(spent)}
    unit = 1 if sys.platform == "darwin" else 1024
    yield {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def timed(parts: dict[str, list[tuple[str, str]]]) -> dict[str, float]:
    """CPU seconds by part, counted on from now whenever one of its functions runs."""
    spent = dict.fromkeys(parts, 0.0)

    def wrap(part: str, module: str, path: str) -> None:
        owner: Any = importlib.import_module(module)
        *above, name = path.split(".")
        for each in above:
            owner = getattr(owner, each)
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - start

        setattr(owner, name, counted)

    for part, functions in parts.items():
        for module, path in functions:
            wrap(part, module, path)
    return spent


def alone(method: str, n: int, d: int, cycles: int, limit: float = LIMIT) -> dict[str, Any]:
    """Mean CPU seconds of a cycle in a process of its own, None when `limit` seconds were over before one had ended."""
    command = [sys.executable, "-m", "experiments.proposal_speed", "--alone", method]
    command += ["--sizes", str(n), "--dimensions", str(d), "--cycles", str(cycles)]
    try:
        done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, timeout=limit)
        output, cut = done.stdout, False
        done.check_returncode()
    except subprocess.TimeoutExpired as late:
        output, cut = late.stdout or b"", True
    lines = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    counted = [line for line in lines if "seconds" in line][1:]
    parts = {name: mean([line["parts"][name] for line in counted]) for name in (counted[0]["parts"] if counted else ())}
    return {
        "method": method,
        "n": n,
        "d": d,
        "cycles": len(counted),
        "cut": cut,
        "seconds": mean([line["seconds"] for line in counted]) if counted else None,
        "parts": parts,
        "bytes": lines[-1].get("bytes") if lines else None,
    }


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ------------------------------------------------------------------------------------------------------- the tables


def duration(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return f"> {LIMIT:.0f} s"
    note = f" ({row['cycles']} cycles)" if row["cut"] else ""
    return f"{row['seconds']:.3g} s{note}"


def ratio(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """What Windtunnel takes over what a rival takes; an upper bound when the rival was cut before its first cycle."""
    if mine["seconds"] is None:
        return ""
    bound = "" if other["seconds"] is not None else "< "
    return f"{bound}{mine['seconds'] / (other['seconds'] or LIMIT):.2f}"


def shares(row: dict[str, Any]) -> str:
    """Where the time of a cycle goes."""
    if row["seconds"] is None:
        return ""
    rest = row["seconds"] - math.fsum(row["parts"].values())
    return "  ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in {**row["parts"], "rest": rest}.items()) + " ms"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured as a table: seconds a cycle, those of Windtunnel over each rival's, and where they go."""
    mine = {(row["n"], row["d"]): row for row in rows if row["method"] == "windtunnel"}
    lines = [f"{'':<12}{'n':>7}{'d':>5}  {'a cycle':<22}{'ratio':<9}{'memory':<10}where it goes"]
    for row in rows:
        own = mine.get((row["n"], row["d"]))
        compared = ratio(own, row) if own and row["method"] in RIVALS else ""
        memory = f"{row['bytes'] / 2**20:.0f} MiB" if row["bytes"] else ""
        lines.append(
            f"{row['method']:<12}{row['n']:>7}{row['d']:>5}  {duration(row):<22}{compared:<9}{memory:<10}"
            f"{shares(row) if row['parts'] else ''}".rstrip()
        )
    return "\n".join(lines)


RIVALS = ("optuna", "botorch")


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=whole_numbers, default=SIZES, help="numbers of runs told")
    parser.add_argument("--dimensions", type=whole_numbers, default=OTHER_DIMENSIONS, help="beside 10, at 200 runs")
    parser.add_argument("--rivals", type=lambda text: [name for name in text.split(",") if name], default=list(RIVALS))
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--only-flat", action="store_true", help="leave out the mixture and 10,000 runs")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.rivals) - set(RIVALS):
        parser.error(f"--rivals may be {', '.join(RIVALS)}, got {', '.join(sorted(unknown))}.")
    if options.alone:
        import torch

        torch.set_num_threads(1)
        for line in measure(options.alone, options.sizes[0], options.dimensions[0], options.cycles):
            print(json.dumps(line), flush=True)
        return
    jobs = [(method, n, DIMENSIONS) for n in options.sizes for method in ("windtunnel", *options.rivals)]
    jobs += [("windtunnel", DIMENSIONS_AT, d) for d in options.dimensions]
    if not options.only_flat:
        jobs += [("windtunnel", LARGE, DIMENSIONS)]
        jobs += [("mixture", n, 0) for n in MIXTURE_SIZES]
    jobs += [("overhead", n, DIMENSIONS) for n in (min(options.sizes), max(options.sizes))]
    rows = []
    for job in jobs:
        rows.append(alone(*job, options.cycles))
        print(report(rows).splitlines()[-1], flush=True)
    print(report(rows))
    if options.save:
        note = {"versions": {name: version(name) for name in ("torch", "botorch", "optuna", "numpy")}, "rows": rows}
        RESULTS.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
