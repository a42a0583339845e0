"""Multilevel Euler-Maruyama sampling for diffusion models (arXiv:2603.24594).

The pieces needed to sample with networks of your own are importable from here; training, measurement and comparison
live in the modules of their names.
"""

from .adapters import adapt, from_diffusers, guided
from .calibration import calibrate
from .drift import Multilevel, Quadrature, SingleLevel, Stitched
from .errors import UserError
from .levels import Level
from .probabilities import constant_probabilities
from .process import CosineSchedule, LinearSchedule, Process
from .samplers import sample

__all__ = [
    "CosineSchedule",
    "Level",
    "LinearSchedule",
    "Multilevel",
    "Process",
    "Quadrature",
    "SingleLevel",
    "Stitched",
    "UserError",
    "adapt",
    "calibrate",
    "constant_probabilities",
    "from_diffusers",
    "guided",
    "sample",
]
