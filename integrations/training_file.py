"""The FILE of `windtunnel run FILE`: a module that defines what to search, what is better, and how to train."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bo import ports
from bo.objective import Objective
from bo.ports import Limits, Train
from bo.trial import Trial
from bo.worker import RunningTrial
from search_spaces import Space

Resources = Mapping[str, Any] | Callable[[Trial], Mapping[str, Any]]

_MARK = "__training_file__"  # on a module: the TrainingFile it was loaded from


@dataclass(frozen=True)
class Loaded:
    """What a training file defines; only the first three are required.

    prepare: called once by the driver before anything runs, to fetch or encode data and to say what there is.
    """

    space: Space
    objective: Objective
    train: Train
    baseline: Mapping[str, Any] | None = None
    n_trials: int | None = None
    budget: float | None = None
    policy: str | None = None
    settings: Mapping[str, Any] | None = None
    stopping: Any = None
    resources: Resources | None = None
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class TrainingFile:
    """A training file as it is now, and the arguments it sees in `sys.argv`.

    The source is read here, once: what is hashed, loaded and sent to workers is the same, though the file be edited
    while its sweep runs. Raises ValueError when there is no such Python file.
    """

    path: Path
    args: tuple[str, ...] = ()
    source: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).resolve())
        object.__setattr__(self, "args", tuple(self.args))
        if self.path.suffix != ".py":
            raise ValueError(f"A training file is a Python file (.py), got {self.path}.")
        if not self.path.is_file():
            raise ValueError(f"There is no training file {self.path}.")
        object.__setattr__(self, "source", self.path.read_bytes())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    @property
    def train(self) -> Train:
        """Its training function, in a form that travels to worker processes and loads the file there."""
        return FileFunction(self)

    def load(self) -> Loaded:
        """What it defines; the file is run once a process. ValueError when it does not run or lacks something."""
        module = self._module()
        defined = {name: getattr(module, name) for name in Loaded.__dataclass_fields__ if hasattr(module, name)}
        for name in ("space", "objective", "train"):
            if name not in defined:
                raise ValueError(f"{self.path} must define space, objective and train; it has no {name}.")
        self._check("space", defined, "a Space", lambda value: isinstance(value, Space))
        self._check("objective", defined, "an objective such as Minimize('loss')", lambda v: isinstance(v, Objective))
        self._check("train", defined, "a function of a trial", callable)
        self._check("baseline", defined, "a config", lambda value: isinstance(value, Mapping))
        self._check("prepare", defined, "a function without arguments", callable)
        policies = sorted(ports.POLICIES)
        self._check("policy", defined, f"one of {', '.join(policies)}", lambda value: value in policies)
        self._check("settings", defined, "a dictionary of settings of the policy", lambda v: isinstance(v, Mapping))
        self._check(
            "resources",
            defined,
            'a dictionary such as {"num_cpus": 1}, or a function of a trial that gives one',
            lambda value: isinstance(value, Mapping) or callable(value),
        )
        try:
            Limits(defined.get("n_trials"), defined.get("budget"))
        except ValueError as error:
            raise ValueError(f"In {self.path}, {error}") from None
        return Loaded(**defined)

    def _check(self, name: str, defined: Mapping[str, Any], what: str, allowed: Callable[[Any], bool]) -> None:
        value = defined.get(name)
        if value is not None and not allowed(value):
            raise ValueError(f"In {self.path}, {name} must be {what}, got {value!r}.")

    def _module(self) -> ModuleType:
        name, root = _home(self.path)
        before = sys.modules.get(name)
        if getattr(before, _MARK, None) == self:
            assert before is not None
            return before
        taken = (
            before is not None and not hasattr(before, _MARK) and getattr(before, "__file__", None) != str(self.path)
        )
        if taken or name in sys.stdlib_module_names:
            raise ValueError(f"{self.path} would take the place of the module {name!r}; give the file another name.")
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        try:
            with _arguments([str(self.path), *self.args]):
                package, _, stem = name.rpartition(".")
                parent = importlib.import_module(package) if package else None
                # Who asks for the source of a function here (the hash of a cost) gets what runs, not what the disk has.
                lines = self.source.decode().splitlines(keepends=True)
                linecache.cache[str(self.path)] = (len(self.source), None, lines, str(self.path))
                sys.modules[name] = module  # as an import does: dataclasses and pickle look there
                exec(compile(self.source, str(self.path), "exec"), module.__dict__)
        except BaseException as error:
            sys.modules.pop(name, None)
            if isinstance(error, Exception) or (isinstance(error, SystemExit) and error.code):
                raise ValueError(f"{self.path} cannot be loaded: {_where(error, self.path)}") from error
            raise  # Ctrl-C, and the exit of `-- --help`
        if parent is not None:
            setattr(parent, stem, module)
        setattr(module, _MARK, self)
        return module


@dataclass(frozen=True)
class FileFunction:
    """The training function of a file, as a value that can be pickled."""

    file: TrainingFile

    def __call__(self, trial: RunningTrial) -> Mapping[str, float]:
        return self.file.load().train(trial)


def _home(path: Path) -> tuple[str, Path]:
    """The dotted name of a file and the folder to import it from: up to the last parent with an `__init__.py`."""
    parts, root = [path.stem], path.parent
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    return ".".join(parts), root


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


def _where(error: BaseException, path: Path) -> str:
    """What went wrong, with the last line of the file that had a part in it."""
    if isinstance(error, SystemExit):
        return f"it ended with exit status {error.code}."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    return f"line {lines[-1]}: {what}" if lines else what
