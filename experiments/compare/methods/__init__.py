"""The methods: a file each, and the pinned requirements (NAME.txt) of the environment that it runs in.

random      Sobol points; recommends the best observed
windtunnel  this checkout, through `Study`, policy "bayes"; recommends `Study.recommend`
ngopt       Nevergrad NGOpt; recommends `provide_recommendation`
tpe, gp     Optuna's TPESampler and GPSampler; recommend `best_trial`
botorch     SingleTaskGP (MixedSingleTaskGP) with LogEI, or qLogNEI where there is noise; recommends the best posterior
            mean among the points it has seen
smac        SMAC3's HyperparameterOptimizationFacade (random forest); recommends its incumbent
hebo        HEBO; recommends the best observed
ax          Ax's Client; recommends `get_best_parameterization`, by its model

The first points are told to all, and stand for the initial design of each. Shares of a mixture: windtunnel has them,
BoTorch gets sum(w) = 1 as an equality constraint, Ax K - 1 shares with a sum of at most one (its Client allows no
equality), all others K unit coordinates u with w proportional to -log(u).
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENGINE = ("bo", "search_spaces")


@dataclass(frozen=True)
class Entry:
    """A method's file, the package in whose environment it runs (none: the project's own), and a rough cost.

    seconds: CPU seconds of a proposal on a small problem, to begin with the cheap ones.
    """

    name: str
    file: str
    environment: str | None
    seconds: float
    argument: str = ""

    @property
    def version(self) -> str:
        """What results are kept under: the pinned version of the library, or what this checkout's engine says."""
        if self.environment is None:
            return "1" if self.name == "random" else engine_version()
        return pinned(self.environment)

    def python(self, environments: Path) -> Path | None:
        """The interpreter of its environment, None where that has not been built as it is pinned now."""
        if self.environment is None:
            return Path(sys.executable)
        folder = environments / self.environment
        mark = folder / "complete"
        built = mark.is_file() and mark.read_text(encoding="utf-8") == requirements_hash(self.environment)
        return folder / "bin" / "python" if built else None

    @property
    def command(self) -> list[str]:
        return ["-m", f"experiments.compare.methods.{self.file}", *([self.argument] if self.argument else [])]


METHODS: Mapping[str, Entry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Entry("random", "sobol", None, 0.001),
            Entry("windtunnel", "windtunnel", None, 0.06),
            Entry("tpe", "optuna", "optuna", 0.01, "tpe"),
            Entry("ngopt", "nevergrad", "nevergrad", 0.01),
            Entry("gp", "optuna", "optuna", 0.13, "gp"),
            Entry("botorch", "botorch", "botorch", 0.2),
            Entry("smac", "smac", "smac", 0.17),
            Entry("hebo", "hebo", "hebo", 2.0),
            Entry("ax", "ax", "ax", 0.6),
        )
    }
)
#: The package whose version names the method's.
LIBRARIES = {"optuna": "optuna", "nevergrad": "nevergrad", "botorch": "botorch", "smac": "smac", "hebo": "HEBO"}
LIBRARIES |= {"ax": "ax-platform", "lightgbm": "lightgbm"}


def requirements(environment: str) -> Path:
    return HERE / f"{environment}.txt"


def requirements_hash(environment: str) -> str:
    return hashlib.sha256(requirements(environment).read_bytes()).hexdigest()


def pinned(environment: str) -> str:
    text = requirements(environment).read_text(encoding="utf-8")
    found = re.search(rf"^{LIBRARIES[environment]}==(\S+)", text, re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise ValueError(f"{requirements(environment)} pins no {LIBRARIES[environment]}.")
    return found[1]


def engine_version() -> str:
    """A hash of what the engine does: its syntax trees, so that a comment or a docstring makes no new version."""
    digest = hashlib.sha256()
    for folder in ENGINE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + meaning(file.read_text(encoding="utf-8")))
    return digest.hexdigest()[:10]


def meaning(source: str) -> bytes:
    """The syntax tree of a file without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)]
    return ast.dump(tree).encode()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
