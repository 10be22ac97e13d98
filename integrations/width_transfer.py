"""Learning rates that hold across widths: maximal update parametrization (muP) by parameter groups and initial scale.

    base = Model(width=64)                                     # where the learning rate was tuned
    model = Model(width=1024)
    rescale_init(model, base)
    optimizer = torch.optim.AdamW(width_groups(model, base, "adamw", lr=config["lr"]))

Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466, table 3, the form that needs no multiplier in the forward pass:

                          input weights, biases, gains    hidden weights    output weights
    initial variance      1 / fan_in                      1 / fan_in        1 / fan_in^2
    learning rate, SGD    fan_out                         1                 1 / fan_in
    learning rate, Adam   1                               1 / fan_in        1 / fan_in

Only ratios to the base model count. With i = fan_in / base fan_in and o = fan_out / base fan_out (1 where a dimension
does not grow, and for the fan_in of a bias or gain) the rates are SGD o / i and Adam 1 / i, and output weights begin
smaller by 1 / sqrt(i) than the usual 1 / sqrt(fan_in) makes them.

What the groups cannot do is left to the model: attention logits must be divided by the head dimension, not its square
root, where heads grow. What transfers is the learning rate and the shape of its schedule; weight decay, dropout, batch
size, the number of steps and the depth do not. Adam's eps has to stay far below the gradients, which shrink as 1/width.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OUT_IN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
"""Modules whose weights have dimensions (out, in, ...)."""

IN_OUT: tuple[type[nn.Module], ...] = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules whose weights have dimensions (in, out, ...)."""


@dataclass(frozen=True)
class Growth:
    """How a parameter's dimensions have grown from the base model to the model; 1.0 for one that has not."""

    fan_in: float
    fan_out: float
    role: str
    """"input", "hidden" or "output", "fixed" for a weight that has not grown, "vector" below two dimensions."""


RULES: dict[str, Callable[[Growth], float]] = {
    # optimizer: learning rate relative to the base model's
    "sgd": lambda growth: growth.fan_out / growth.fan_in,
    "adam": lambda growth: 1 / growth.fan_in,  # and all whose update of an entry does not scale with its gradient
    "adamw": lambda growth: 1 / growth.fan_in,
    "adamp": lambda growth: 1 / growth.fan_in,
    "lion": lambda growth: 1 / growth.fan_in,
}


def growth(model: nn.Module, base: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, Growth]:
    """How each parameter of `model` has grown since `base`, the same architecture at the base width.

    roles: name of a parameter -> "input" (only what it gives grows), or "output" (only what it takes grows), for
    parameters of own modules where the shape alone does not tell, such as a table of positions.

    ValueError, naming the parameter: the models differ in more than width, a parameter's role is not clear, it is tied
    between an input and an output, or it grows in three dimensions.
    """
    roles = dict(roles or {})
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    for name in [*ours, *theirs, *roles]:
        if name not in ours or name not in theirs:
            near = difflib.get_close_matches(name, theirs if name in ours else ours, 1)
            hint = f", did you mean {near[0]!r}" if near else ""
            raise ValueError(f"{name!r} is not a parameter of both models{hint}; they may differ in width only.")
    for name, role in roles.items():
        if role not in ("input", "output"):
            raise ValueError(f"The role of {name!r} must be 'input' or 'output', got {role!r}.")
    outward = _outward(model)
    grown = {}
    for name, parameter in ours.items():
        if parameter.ndim != theirs[name].ndim:
            raise ValueError(
                f"{name!r} has the shape {tuple(parameter.shape)} and in the base model {tuple(theirs[name].shape)}; "
                "the models may differ in width only."
            )
        ratios = [now / then for now, then in zip(parameter.shape, theirs[name].shape, strict=True)]
        grown[name] = _growth(name, ratios, outward[name], roles.get(name))
    return grown


def _outward(model: nn.Module) -> dict[str, set[int | None]]:
    """The dimension that counts what a parameter gives, in each module that has it; None where that is not known."""
    found: dict[int, set[int | None]] = {}
    for module in model.modules():
        dimension = 0 if isinstance(module, OUT_IN) else 1 if isinstance(module, IN_OUT) else None
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), set()).add(dimension)
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def _growth(name: str, ratios: Sequence[float], outward: set[int | None], role: str | None) -> Growth:
    growing = [dimension for dimension, ratio in enumerate(ratios) if ratio != 1]
    if len(ratios) < 2:
        return Growth(1.0, math.prod(ratios), "vector")
    if len(growing) > 2 or (role is not None and len(growing) > 1):
        raise ValueError(
            f"{name!r} grows in {len(growing)} dimensions; {role or 'a weight'} has at most {1 if role else 2}."
        )
    if role is not None:
        ratio = math.prod(ratios)
        return Growth(1.0, ratio, role) if role == "input" else Growth(ratio, 1.0, role)
    if len(growing) == 2 and ratios[growing[0]] == ratios[growing[1]]:  # whichever way it is stored
        return Growth(ratios[growing[0]], ratios[growing[0]], "hidden")
    if not growing:
        return Growth(1.0, 1.0, "fixed")
    if len(outward) > 1:
        raise ValueError(
            f"{name!r} is tied between an input and an output, whose rules differ; say that it is an input by "
            f"roles={{{name!r}: 'input'}} and divide the output by the growth of the width in the forward pass."
        )
    (out,) = outward
    if out is None or not set(growing) <= {0, 1}:
        raise ValueError(
            f"{name!r} of an own module grows in dimension {growing}, and what that is cannot be seen from its shape; "
            f"say so by roles={{{name!r}: 'input'}}, or 'output'."
        )
    fan_in, fan_out = ratios[1 - out], ratios[out]
    return Growth(fan_in, fan_out, "hidden" if len(growing) == 2 else "input" if fan_in == 1 else "output")


def width_groups(
    model: nn.Module,
    base: nn.Module,
    optimizer: str,
    lr: float,
    weight_decay: float | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of `model` with the rate that `lr`, tuned on `base`, becomes at its width.

    optimizer: a name in RULES; sgd_sai is not there, since nobody has derived how its scale grows. lr: the peak rate at
    the base width. weight_decay: given, it is divided by the multiplier of the rate, so that lr * weight_decay, what
    decoupled decay takes off a weight in a step, is that of the base model in every group. roles: see `growth`.

    Each group is a dictionary of params, lr and "role" (see `Growth`), for settings of your own, such as no weight
    decay on group["role"] == "vector"; torch's optimizers keep keys they do not know. ValueError as `growth`.
    """
    if optimizer not in RULES:
        raise ValueError(f"There is no width rule for the optimizer {optimizer!r}; there are rules for {list(RULES)}.")
    grown = growth(model, base, roles)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        multiplier = RULES[optimizer](grown[name])
        key = (grown[name].role, multiplier)
        if key not in groups:
            groups[key] = {"params": [], "lr": lr * multiplier, "role": grown[name].role}
            if weight_decay is not None:
                groups[key]["weight_decay"] = weight_decay / multiplier
        groups[key]["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def rescale_init(
    model: nn.Module, base: nn.Module, by_fan_in: bool = True, roles: Mapping[str, str] | None = None
) -> None:
    """Bring freshly made weights of `model` to the initial scale that goes with `width_groups`, in place, once.

    by_fan_in: whether the model's own initialisation has standard deviations that fall as 1 / sqrt(fan_in), as torch's
    Linear and convolutions, Xavier's and Kaiming's have; False for ones that do not depend on the width, such as 0.02.
    Biases and gains are left: zeros and ones are right at every width. Initialise the input weights of torch's own
    recurrent layers yourself: they fall with the hidden size, as only the hidden weights should. roles: see `growth`.
    ValueError as there.
    """
    for name, grown in growth(model, base, roles).items():
        usual = 1.0 if by_fan_in else grown.fan_in**-0.5
        model.get_parameter(name).mul_(usual * (grown.fan_in**-0.5 if grown.role == "output" else 1.0))


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    widths: Sequence[int],
    inputs: Tensor,
    loss: Callable[[Any], Tensor],
    steps: int = 3,
    seeds: Sequence[int] = (0, 1, 2, 3),
) -> dict[str, float]:
    """By layer, how the change of its output in training grows with width: 0 where rates transfer (appendix D.1 there).

    make_model: width -> a model; torch's generator is seeded before each, and brought back at the end. make_optimizer:
    that model -> its optimizer. inputs: the batch that the model is called with, at every step. loss: the model's
    output -> what is minimised. seeds: more of them for slopes that are noisy.

    Every module with parameters of its own that gives a tensor, or a tuple that begins with one, is a layer; the change
    is the root mean square of its coordinates' differences from their initial values. The result is the least-squares
    slope of log change against log width, the logs averaged over steps 1 .. steps and over seeds: about 0 in muP, 1
    where an update grows with the width, -1/2 where it shrinks as its square root.

    ValueError for fewer than two widths, for a model with dropout, whose masks would count as changes, or for a change
    that is 0 or not finite and so has no slope: a frozen layer, a learning rate so low that nothing moves, or so high
    that training diverges.
    """
    if len(set(widths)) < 2 or steps < 1 or not seeds:
        raise ValueError(
            f"coordinate_check needs two widths, a step and a seed at least, got {widths=}, {steps=} and {seeds=}."
        )
    logs: dict[str, list[float]] = {}
    with torch.random.fork_rng([inputs.get_device()] if inputs.is_cuda else []):
        for width in widths:
            changes: dict[str, list[float]] = {}
            for seed in seeds:
                torch.manual_seed(seed)
                model = make_model(width)
                for name, sizes in _changes(model, make_optimizer(model), inputs, loss, steps).items():
                    changes.setdefault(name, []).extend(sizes)
            for name, sizes in changes.items():
                if not all(math.isfinite(size) and size > 0 for size in sizes):
                    raise ValueError(
                        f"Layer {name!r} at width {width} changed by {sizes}; a slope needs changes that are finite "
                        "and not 0, so train it, with another learning rate."
                    )
                logs.setdefault(name, []).append(float(np.mean(np.log(sizes))))
    x = np.log(np.array(widths, dtype=np.float64))
    return {name: float(np.polyfit(x, sizes, 1)[0]) for name, sizes in logs.items()}


def _changes(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, loss: Callable[[Any], Tensor], steps: int
) -> dict[str, list[float]]:
    """Layer -> root mean square of what its output moved by after 1 .. steps steps."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output  # of attention, of an LSTM
            if isinstance(first, Tensor):
                outputs[name] = first.detach().clone()

        return hook

    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        model(inputs)
        start = dict(outputs)
        model(inputs)
    for name, output in outputs.items():
        if not torch.allclose(output, start[name], equal_nan=True):
            raise ValueError(
                f"Layer {name!r} gives other outputs for the same inputs, which would count as changes; make the model "
                "without dropout."
            )
    sizes: dict[str, list[float]] = {}
    for step in range(steps + 1):
        value = loss(model(inputs))
        if step > 0:
            for name, output in outputs.items():
                sizes.setdefault(name, []).append((output - start[name]).square().mean().sqrt().item())
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return sizes
