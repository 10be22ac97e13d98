"""What a torch training loop needs of a trial: its schedule as a scheduler, checkpoints that resume bit for bit.

    scheduler = ScheduledLR(optimizer, config["schedule"], total_steps)
    training = TrainingState(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
    if (saved := trial.load()) is not None:
        training.restore(saved)
    ...
    trial.save(training.state())

The data's side is domain_sampler.py, the optimizers are in optimizers.py, rates across widths in width_transfer.py.
"""

from __future__ import annotations

import difflib
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from search_spaces.curve import Curve, OneCycle


class ScheduledLR(LRScheduler):
    """Drives the learning rates of an optimizer by a schedule, or by one schedule for each parameter group.

        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
        scheduler = ScheduledLR(optimizer, config["schedule"], total_steps)
        for batch in loader:
            ...
            optimizer.step()
            scheduler.step()

    The rate that a group has when the scheduler is made is its peak, or its "initial_lr" where an earlier scheduler
    left one, as in a restored optimizer; step t = 0 .. total_steps - 1 gets peak * schedule.factor(t, total_steps). The
    rate of step 0 is set at once, and the last `step()` of a run sets the factor at total_steps; one more raises
    ValueError and changes nothing.

    A rate that something else multiplied since the last step keeps that factor, as with torch's own schedulers, so it
    works in a ChainedScheduler (make it first, then the others) and in a SequentialLR. `last_epoch` is the last step
    that was taken, -1 for none and 99 after 100 steps: to go on without a saved state of the scheduler, give it
    together with a restored optimizer, whose groups know their peaks as "initial_lr". `cycle_momentum`: whether groups
    under a OneCycle schedule also get its momentum, as "momentum" or the first of "betas"; under other schedules it
    changes nothing.

    TypeError for what is no schedule; ValueError for a total or a number of schedules that does not fit, or an
    optimizer without the momentum to cycle; KeyError (torch's) without those peaks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Curve | Sequence[Curve],
        total_steps: int,
        last_epoch: int = -1,
        *,
        cycle_momentum: bool = False,
    ) -> None:
        if not _is_finite(total_steps) or total_steps != int(total_steps):
            raise ValueError(f"ScheduledLR needs a whole number of total_steps, got {total_steps!r}.")
        if total_steps < 1 or not -1 <= last_epoch < total_steps:
            raise ValueError(
                "ScheduledLR needs total_steps >= 1 and last_epoch in [-1, total_steps), "
                f"got total_steps={total_steps!r} and last_epoch={last_epoch!r}."
            )
        groups = len(optimizer.param_groups)
        schedules = list(schedule) if isinstance(schedule, Sequence) else [schedule] * groups
        for curve in schedules:
            if not isinstance(curve, Curve):
                raise TypeError(
                    f"ScheduledLR needs schedules such as Cosine(warmup=0.02) or config['schedule'], got {curve!r}."
                )
        if len(schedules) != groups:
            raise ValueError(
                f"ScheduledLR got {len(schedules)} schedules for {groups} parameter groups; give one, or one for each."
            )
        if cycle_momentum and not all("momentum" in group or "betas" in group for group in optimizer.param_groups):
            raise ValueError(
                f"ScheduledLR cannot cycle the momentum of {type(optimizer).__name__}, whose groups have neither "
                "momentum nor betas; leave cycle_momentum out."
            )
        self.schedules = schedules
        self.total_steps = int(total_steps)  # tokens // tokens_per_step is a float
        self.cycle_momentum = cycle_momentum
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the next step; ValueError after `total_steps` of them, or for another number of groups.

        `epoch` is torch's, deprecated: the step to set the rates of.
        """
        if (self.last_epoch + 1 if epoch is None else epoch) > self.total_steps:  # before anything is counted
            raise ValueError(
                f"ScheduledLR has come to the end of its {self.total_steps} steps; "
                "make it with the total_steps of the whole run."
            )
        if len(self.optimizer.param_groups) != len(self.schedules):
            raise ValueError(
                f"ScheduledLR was made for {len(self.schedules)} parameter groups and the optimizer now has "
                f"{len(self.optimizer.param_groups)}; add groups before it is made, with frozen parameters if need be."
            )
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates at step `last_epoch`, one for each group; read `get_last_lr()` from outside."""
        self._set_momentum()  # here, since torch has no later place, and as its own OneCycleLR does
        rates = self._rates(self.last_epoch)
        if self.last_epoch == 0 or not hasattr(self, "_last_lr"):  # it begins, whatever the rates were before
            return rates
        return [
            rate if group["lr"] == before or before == 0 else group["lr"] / before * rate
            for rate, before, group in zip(
                rates, self._rates(self.last_epoch - 1), self.optimizer.param_groups, strict=True
            )
        ]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """What torch takes for `step(epoch)`, since after a jump there is no step before to compare with."""
        self._set_momentum()
        return self._rates(self.last_epoch)

    def _rates(self, step: int) -> list[float | Tensor]:
        """Each group's peak times its factor at `step`."""
        return [
            peak * schedule.factor(step, self.total_steps)
            for peak, schedule in zip(self.base_lrs, self.schedules, strict=True)
        ]

    def _set_momentum(self) -> None:
        for group, schedule in zip(self.optimizer.param_groups, self.schedules, strict=True):
            if self.cycle_momentum and isinstance(schedule, OneCycle):
                momentum = schedule.momentum(self.last_epoch, self.total_steps)
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum

    def state_dict(self) -> dict[str, Any]:
        """Plain data that `trial.save` takes."""
        return {
            "total_steps": self.total_steps,
            "schedules": [schedule.to_json() for schedule in self.schedules],
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "_last_lr": list(self._last_lr),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict()` was taken; the optimizer may be restored before or after.

        ValueError when it was taken under other schedules or another total: a resumed run would jump to another curve.
        """
        saved = dict(state_dict)
        mine = self.state_dict()
        for name in ("total_steps", "schedules"):
            if saved[name] != mine[name]:
                raise ValueError(
                    f"The saved ScheduledLR has {name}={saved[name]!r} and this one {mine[name]!r}; "
                    "make it as it was, or start it elsewhere by last_epoch."
                )
        del saved["total_steps"], saved["schedules"]
        made = self._last_lr
        super().load_state_dict(saved)
        for group, first, last in zip(self.optimizer.param_groups, made, self._last_lr, strict=True):
            if group["lr"] == first:  # made after the optimizer was restored, this scheduler overwrote its rate
                if isinstance(group["lr"], Tensor):
                    group["lr"].copy_(torch.as_tensor(last))
                else:
                    group["lr"] = last
        self._set_momentum()


class TrainingState:
    """Everything a run needs to go on as if it had not stopped, for `trial.save` and `trial.load`.

    parts: by name, what has `state_dict` and `load_state_dict` (model, optimizer, scheduler, sampler, gradient scaler,
    averaged weights ...) or is a generator of random numbers (torch.Generator, numpy.random.Generator, random.Random).
    The global generators of torch (CPU and CUDA), numpy and Python are kept always. On a CPU a restored run goes on bit
    for bit when

    - the loop saves between two steps, after it told the sampler what it consumed (`sampler.advance`);
    - a DataLoader has a generator of its own, `DataLoader(..., generator=torch.Generator())`: it draws a number at each
      `iter(loader)`, and taken from the global generator that shifts the dropout masks after a resume;
    - nothing random happens in DataLoader workers, whose generators no checkpoint reaches.

    With several ranks each has random states of its own: let every rank save its own state.
    """

    def __init__(self, **parts: Any) -> None:
        for name, part in parts.items():
            if not isinstance(part, _GENERATORS) and not all(
                callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")
            ):
                raise TypeError(
                    f"TrainingState cannot keep {name}, a {type(part).__name__}; it takes what has state_dict and "
                    "load_state_dict, and random generators; put numbers beside it in what trial.save gets."
                )
        self._parts = parts

    def state(self) -> dict[str, Any]:
        """The state now, as `trial.save` takes it; its tensors are the parts' own, so save it before the next step."""
        return {
            "parts": {name: _state_of(part) for name, part in self._parts.items()},
            "random": _global_generators(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Bring all parts and the global generators to `state`; ValueError, before anything changed, for other parts.

        Warns when CUDA generators were saved that this machine does not have.
        """
        if not isinstance(state, Mapping) or not state.keys() >= {"parts", "random"}:
            what = list(state) if isinstance(state, Mapping) else f"a {type(state).__name__}"
            raise ValueError(f"TrainingState.restore needs what state() gave, got {what}; pass that part of it.")
        saved = state["parts"]
        for name in [*self._parts, *saved]:
            if name not in saved or name not in self._parts:
                near = difflib.get_close_matches(name, saved if name in self._parts else self._parts, 1)
                hint = f", did you mean {near[0]!r}" if near else ""
                raise ValueError(
                    f"The checkpoint holds {list(saved)} and this TrainingState {list(self._parts)}: "
                    f"{name!r} is only in one of them{hint}; make it with the parts that were saved."
                )
        for name, part in self._parts.items():
            _bring(part, saved[name])
        _bring_global_generators(state["random"])  # last: loading a part may draw


_GENERATORS = (torch.Generator, np.random.Generator, random.Random)


def _state_of(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    if isinstance(part, random.Random):
        return part.getstate()
    return part.state_dict()


def _bring(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif isinstance(part, random.Random):
        part.setstate(state)
    else:
        part.load_state_dict(state)


def _global_generators() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    # Where CUDA is not initialized nothing was drawn there, and asking would take the device's memory.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _bring_global_generators(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    devices = state.get("cuda", [])
    here = torch.cuda.device_count() if devices else 0
    if here < len(devices):
        warnings.warn(
            f"The checkpoint has random states of {len(devices)} CUDA devices and this machine has {here}; "
            "the run goes on, but not with the same random numbers.",
            stacklevel=3,
        )
    for device, rng in enumerate(devices[:here]):
        torch.cuda.set_rng_state(rng, device)


def scale_lr(lr: float, batch: float, new_batch: float, exponent: float) -> float:
    """The learning rate for another batch size: lr * (new_batch / batch) ** exponent.

    exponent: 1 for SGD at small batches, 1/2 for Adam and its kin (Granziol et al., arXiv 2006.09092), 0 to keep the
    rate, or your own; there is no default, since published laws disagree. batch, new_batch: in samples or tokens, above
    0. Holds below the critical batch size, where the rate saturates. ValueError for what is not such a number.
    """
    for name, value in (("lr", lr), ("batch", batch), ("new_batch", new_batch)):
        if not _is_finite(value) or value <= 0:
            raise ValueError(f"scale_lr needs a finite {name} > 0, got {value!r}.")
    if not _is_finite(exponent):
        raise ValueError(f"scale_lr needs a finite number as exponent, such as 0, 0.5 or 1, got {exponent!r}.")
    return float(lr * (new_batch / batch) ** exponent)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
