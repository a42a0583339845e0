"""Multilevel Euler-Maruyama sampling for diffusion models (arXiv:2603.24594).

This package exports all that you need to sample with your own networks. Training, measurement and comparison have
sub-packages of their own.
"""

from .diffusion.brownian import BrownianPath as BrownianPath
from .diffusion.level import Level as Level
from .diffusion.process import CosineSchedule as CosineSchedule
from .diffusion.process import LinearSchedule as LinearSchedule
from .diffusion.process import Process as Process
from .diffusion.sampler import SingleLevel as SingleLevel
from .diffusion.sampler import Stitched as Stitched
from .diffusion.sampler import sample as sample
from .diffusion.step_rules import step_rule as step_rule
from .errors import UserError as UserError
from .models.adapters import adapt as adapt
from .models.adapters import from_diffusers as from_diffusers
from .models.adapters import guided as guided
from .multilevel.estimators import Multilevel as Multilevel
from .multilevel.estimators import Quadrature as Quadrature
from .multilevel.estimators import constant_probabilities as constant_probabilities
from .multilevel.planner import calibrate as calibrate
