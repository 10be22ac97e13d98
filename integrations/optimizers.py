"""Optimizers by name, so that a Choice can name them; one row a name.

    space = Space(optimizer=Choice({
        "adamw": {"lr": Real(1e-4, 1e-2, log=True), "weight_decay": Real(1e-3, 1, log=True)},
        "lion": {"lr": Real(2e-5, 2e-3, log=True)},
        "sgd_sai": {"lr": Real(1e-3, 1e-1, log=True)},
    }))
    optimizer = make_optimizer(config["optimizer"], model.parameters(), config["lr"])

Each has rates of its own: Lion's lie at about a fifth of AdamW's, SGD-SaI's at ten times them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from search_spaces.parameter import suggestion

OPTIMIZERS: dict[str, tuple[str, str]] = {
    # name: (package, class); it is imported when the optimizer is made
    "adamw": ("torch.optim", "AdamW"),  # betas 0.9, 0.999; decoupled weight decay 0.01
    "sgd": ("torch.optim", "SGD"),  # momentum 0; weight decay 0, added to the gradient
    "lion": ("pytorch_optimizer", "Lion"),  # betas 0.9, 0.99; decoupled weight decay 0 (Chen et al., arXiv 2302.06675)
    "adamp": ("pytorch_optimizer", "AdamP"),  # as Adam; decoupled weight decay 0 (Heo et al., arXiv 2006.08217)
    "sgd_sai": ("pytorch_optimizer", "SGDSaI"),  # momentum 0.9; decoupled decay 0.01 (Xu et al., arXiv 2412.11768)
}


def make_optimizer(name: str, params: Iterable[Any], lr: float, **settings: Any) -> Optimizer:
    """The optimizer that OPTIMIZERS has under `name`.

    params: parameters or parameter groups, as every torch optimizer takes them. lr: the peak rate. settings: keywords
    of the class (weight_decay, betas, momentum ...); `beta1` and `beta2` may be given one by one, since a parameter of
    a space is one number. Settings left out have the class's own defaults.

    Weight decay is decoupled (p <- p - lr * weight_decay * p) for all but sgd, where torch adds weight_decay * p to
    the gradient. SGD-SaI takes its scales from the first gradient it sees: do not step on an unusual batch first.

    ValueError for an unknown name or setting, ImportError saying what to install when the package is missing.
    """
    if name not in OPTIMIZERS:
        hint = suggestion(name, OPTIMIZERS, f"there are {list(OPTIMIZERS)}.")
        raise ValueError(f"There is no optimizer {name!r}; {hint}")
    module, attribute = OPTIMIZERS[name]
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImportError(
            f"Optimizer {name!r} comes from the package {module}, which cannot be imported ({error}); "
            "install it by pip install 'windtunnel[training]'."
        ) from error
    # Classes of pytorch_optimizer swallow unknown keywords, so a misspelt one would do nothing.
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    known = [*(["beta1", "beta2"] if "betas" in defaults else []), *(key for key in defaults if key != "lr")]
    for key in settings:
        if key not in known:
            hint = suggestion(key, known, f"it has {known}.")
            raise ValueError(f"Optimizer {name!r} has no setting {key!r}; {hint}")
    single = {i: settings.pop(f"beta{i + 1}") for i in (0, 1) if f"beta{i + 1}" in settings}
    if single:
        if "betas" in settings:
            raise ValueError(f"Optimizer {name!r} got betas beside beta1 or beta2; give one or the other.")
        settings["betas"] = tuple(single.get(i, defaults["betas"][i]) for i in (0, 1))
    optimizer: Optimizer = cls(params, lr=lr, **settings)
    return optimizer
