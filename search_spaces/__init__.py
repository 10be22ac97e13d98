"""What may be searched: parameters, mixtures, schedules and scales, and their chart on the unit cube. numpy only."""

from search_spaces.codec import space_from_json, space_to_json
from search_spaces.fidelity import Axis, Fidelity, Scale
from search_spaces.mixture import Mixture
from search_spaces.parameter import Choice, Column, Integer, Real
from search_spaces.schedule import FAMILIES, REX, WSD, Cosine, Curve, Linear, Schedule, curve_from_json
from search_spaces.space import Space

__all__ = [
    "FAMILIES",
    "REX",
    "WSD",
    "Axis",
    "Choice",
    "Column",
    "Cosine",
    "Curve",
    "Fidelity",
    "Integer",
    "Linear",
    "Mixture",
    "Real",
    "Scale",
    "Schedule",
    "Space",
    "curve_from_json",
    "space_from_json",
    "space_to_json",
]
