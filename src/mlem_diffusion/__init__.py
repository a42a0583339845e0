"""Multilevel Euler-Maruyama sampling for diffusion models (arXiv:2603.24594).

This package exports all that you need to sample with your own networks. Training, measurement and comparison have
sub-packages of their own.
"""

from .diffusion.brownian import BrownianPath
from .diffusion.level import Level
from .diffusion.process import CosineSchedule, LinearSchedule, Process
from .diffusion.sampler import SingleLevel, Stitched, sample
from .diffusion.step_rules import step_rule
from .errors import UserError
from .models.adapters import adapt, from_diffusers, guided
from .multilevel.calibrate import calibrate
from .multilevel.estimators import Multilevel, Quadrature
from .multilevel.probabilities import constant_probabilities

__all__ = [
    "BrownianPath",
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
    "step_rule",
]
