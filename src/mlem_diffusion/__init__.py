"""Multilevel Euler-Maruyama sampling for diffusion models (arXiv:2603.24594): all that sampling with your own networks
needs. Training, measurement and comparison have sub-packages of their own."""
# ruff: noqa: F401

from .diffusion.brownian import BrownianPath
from .diffusion.level import Level
from .diffusion.process import CosineSchedule, FlowSchedule, LinearSchedule, Process
from .diffusion.sampler import SingleLevel, Stitched, sample
from .diffusion.step_rules import step_rule
from .errors import UserError
from .models.adapters import adapt
from .models.diffusers import from_diffusers, process_of
from .models.gaussian import fit_gaussian
from .models.guidance import guided
from .models.interpolants import Interpolant, flow
from .models.latents import Latents, latents_of
from .multilevel.estimators import Multilevel, Quadrature, constant_probabilities
from .multilevel.planner import calibrate
