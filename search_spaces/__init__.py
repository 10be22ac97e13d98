"""What may be searched: parameters, mixtures, schedules and scales, and their chart on the unit cube. numpy only."""

from search_spaces.carry import Carried, CarriedScales, carry, carry_scales
from search_spaces.codec import space_from_json, space_to_json
from search_spaces.curve import (
    FAMILIES,
    REX,
    WSD,
    Constant,
    Cosine,
    Curve,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Piecewise,
    Power,
    Refined,
    Step,
    WSDExponential,
    WSDHalfLife,
    WSDSqrt,
    curve_from_json,
)
from search_spaces.fidelity import Axis, Fidelity, MeasuredCost, Scale, batch_tokens
from search_spaces.mixture import Mixture
from search_spaces.mixture_schedule import MixtureSchedule, SwitchedMixture
from search_spaces.parameter import Choice, Column, Integer, Real
from search_spaces.schedule import Schedule, stable_until
from search_spaces.space import Space

__all__ = [
    "FAMILIES",
    "REX",
    "WSD",
    "Axis",
    "Carried",
    "CarriedScales",
    "Choice",
    "Column",
    "Constant",
    "Cosine",
    "Curve",
    "Exponential",
    "Fidelity",
    "Integer",
    "InverseSqrt",
    "Linear",
    "MeasuredCost",
    "Mixture",
    "MixtureSchedule",
    "OneCycle",
    "Piecewise",
    "Power",
    "Real",
    "Refined",
    "Scale",
    "Schedule",
    "Space",
    "Step",
    "SwitchedMixture",
    "WSDExponential",
    "WSDHalfLife",
    "WSDSqrt",
    "batch_tokens",
    "carry",
    "carry_scales",
    "curve_from_json",
    "space_from_json",
    "space_to_json",
    "stable_until",
]
