"""Step rules as data: one matrix per network evaluation maps the old state to the new state.

All these rules are linear in (state, estimate, noise), so one loop (sampler.py) runs them all, and the effect of an
estimate on the final image follows exactly from the transposed matrices and the derivative of the network.

The state has m images, initially (x, 0, ..., 0). The network is always evaluated at state 0.
Notation: a step leads from noise level s to t, h = (logsnr_t - logsnr_s) / 2 > 0, and "denoised" is the estimate."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..errors import UserError
from .process import TimeGrid, alpha_sigma


@dataclass(frozen=True)
class Evaluation:
    """One network evaluation and the linear update that follows it."""

    logsnr: float  # noise level at which the network is evaluated
    update: np.ndarray  # float64 [m, m + 2]: (state_0, ..., state_{m-1}, estimate, z) -> new state
    noise: int | None = None  # index of the standardised increment z; None without noise


@dataclass(frozen=True)
class StepRule:
    """A step rule: the evaluations of its steps on a grid, and the clock that standardises its Brownian increments."""

    dynamics: str  # "sde" or "ode"
    name: str
    label: str  # the name in the literature
    evaluations: Callable[[TimeGrid], Iterable[Evaluation]]
    clock: str | None  # "time" or "snr"; None without noise
    lowest: float = -math.inf  # the log-SNR that it can start at: from nearly pure noise some leave the data

    @property
    def key(self) -> str:  # such as "sde/ddpm"
        return f"{self.dynamics}/{self.name}"

    def program(self, grid: TimeGrid) -> list[Evaluation]:
        """All evaluations of a run; the last is the final denoising, which puts the estimate in state 0. UserError for
        a grid that starts below `lowest`."""
        if grid.logsnr[0] < self.lowest:
            text = f"{self.key} cannot start at a log-SNR of {grid.logsnr[0]:.4g}, only from {self.lowest:g}"
            raise UserError(f"{text}: set process.logsnr_min, or take another rule.")
        steps = list(self.evaluations(grid))
        final = np.zeros_like(steps[0].update)
        final[0, -2] = 1
        return [*steps, Evaluation(float(grid.logsnr[-1]), final)]


@dataclass(frozen=True)
class Step:
    """One step s -> t between neighbouring noise levels of a grid."""

    alpha_s: float
    sigma_s: float
    logsnr_s: float
    alpha_t: float
    sigma_t: float
    logsnr_t: float
    h: float  # half the step in log-SNR
    h_before: float | None  # h of the previous step; None for the first step
    beta_dt: float  # beta(s) * (time(s) - time(t))


def steps_of(grid: TimeGrid) -> list[Step]:
    """The n - 1 steps of a grid."""
    levels = np.stack([*alpha_sigma(grid.logsnr), grid.logsnr], axis=1).tolist()  # alpha, sigma, logsnr
    h = [None, *(0.5 * np.diff(grid.logsnr)).tolist()]
    beta_dt = (grid.beta[:-1] * (grid.time[:-1] - grid.time[1:])).tolist()
    columns = zip(levels[:-1], levels[1:], h[1:], h[:-1], beta_dt, strict=True)
    return [Step(*before, *after, *rest) for before, after, *rest in columns]


# the four rules x' = a x + b denoised + c z return (a, b, c)
def em_sde(step: Step) -> tuple[float, float, float]:
    """Euler-Maruyama in t of the reverse SDE dx = -beta (x/2 + score) dt + sqrt(beta) dW (Song et al. 2021, eq. 6),
    with score = (alpha denoised - x) / sigma^2."""
    to_score = step.beta_dt / step.sigma_s**2
    return 1 + 0.5 * step.beta_dt - to_score, step.alpha_s * to_score, math.sqrt(step.beta_dt)


def em_ode(step: Step) -> tuple[float, float, float]:
    """Euler in t of the probability flow dx = -beta/2 (x + score) dt (Song et al. 2021, eq. 13),
    with x + score = (alpha denoised - alpha^2 x) / sigma^2."""
    half = 0.5 * step.beta_dt
    return 1 - half * math.exp(step.logsnr_s), half * step.alpha_s / step.sigma_s**2, 0.0


def ddpm(step: Step) -> tuple[float, float, float]:
    """Ancestral step with the posterior variance (Ho et al. 2020, eq. 7). It is exactly the EM step of
    dm = denoised du + dW_u with u = alpha^2/sigma^2 and m = u x / alpha."""
    keep, fresh = math.exp(-2 * step.h), -math.expm1(-2 * step.h)  # keep = u_s / u_t
    return step.alpha_t / step.alpha_s * keep, step.alpha_t * fresh, step.sigma_t * math.sqrt(fresh)


def ddim(step: Step) -> tuple[float, float, float]:
    """Deterministic DDIM (Song et al. 2020, eq. 12 with eta = 0)."""
    return step.sigma_t / step.sigma_s, -step.alpha_t * math.expm1(-step.h), 0.0


def _linear(
    rule: Callable[[Step], tuple], grid: TimeGrid, multistep: bool = False, longest: float = math.inf
) -> Iterator[Evaluation]:
    """Evaluations of a rule x' = a x + b denoised + c z; the state is (x), or (x, previous estimate) if multistep.
    A multistep rule extrapolates the last two estimates to the middle of each step but the first: of DDIM this makes
    DPM-Solver++(2M) with data prediction (Lu et al. 2022, algorithm 2), of the ancestral rule its SDE form.
    longest: a step longer than this, in units of the one before, is extrapolated as if it were so long."""
    for i, step in enumerate(steps_of(grid)):
        a, b, c = rule(step)
        back = 0.0 if step.h_before is None else 0.5 * min(step.h / step.h_before, longest)
        update = [[a, -b * back, b * (1 + back), c], [0, 0, 1, 0]] if multistep else [[a, b, c]]
        yield Evaluation(step.logsnr_s, np.array(update), i if c else None)


def heun(grid: TimeGrid) -> Iterator[Evaluation]:
    """Heun's method (Karras et al. 2022, algorithm 1): two evaluations a step.
    For y = x / alpha with noise rho = sigma / alpha, the flow is dy = (y - denoised) / rho drho. The state is
    (the point to evaluate, x advanced with half of the first slope), both in units of x at t."""
    for step in steps_of(grid):
        a, b, _ = ddim(step)  # the predictor; rho_t / rho_s = e^-h
        to_t, drop = step.alpha_t / step.alpha_s, -0.5 * math.expm1(-step.h)
        yield Evaluation(step.logsnr_s, np.array([[a, 0, b, 0], [to_t * (1 - drop), 0, step.alpha_t * drop, 0]]))
        pull = 0.5 * math.expm1(step.h)  # (rho_s - rho_t) / (2 rho_t)
        yield Evaluation(step.logsnr_t, np.array([[-pull, 1, step.alpha_t * pull, 0], [0, 0, 0, 0]]))


def unipc(grid: TimeGrid) -> Iterator[Evaluation]:
    """UniPC of order 2 with its corrector, B(h) = e^h - 1 (bh2) and data prediction (Zhao et al. 2023).
    The first step has order 1. Predictor and corrector share one network evaluation, at the predicted point. The state
    is (predicted point, corrected point without the term of the estimate at the predicted point, previous estimate)."""
    share = None  # coefficient of the new estimate in the corrected point; None for the first point
    for step in steps_of(grid):
        corrected = np.array([1.0, 0, 0, 0, 0]) if share is None else np.array([0, 1.0, 0, share, 0])
        new, before = np.array([0, 0, 0, 1.0, 0]), np.array([0, 0, 1.0, 0, 0])
        a, b, _ = ddim(step)
        if step.h_before is None:
            predicted, rest, weight = new, 0.5 * new, 0.5
        else:
            r = step.h_before / step.h
            slope = (new - before) / r
            # weights of the two difference quotients in UniC-2, for the new point and for the previous one at -r h:
            # weight + old = b1, weight - r old = b2 with b1 = phi_2/phi_1, b2 = 2 phi_3/phi_1 at -h
            b1, b2 = _phi(2, -step.h) / _phi(1, -step.h), 2 * _phi(3, -step.h) / _phi(1, -step.h)
            old = (b1 - b2) / (1 + r)
            weight = b1 - old
            predicted, rest = new + 0.5 * slope, (1 - weight) * new + old * slope
        yield Evaluation(step.logsnr_s, np.stack([a * corrected + b * predicted, a * corrected + b * rest, new]))
        share = b * weight


def _phi(k: int, z: float) -> float:
    """phi_k(z) = sum_i z^i / (i + k)!; for |z| >= 1 by phi_0 = e^z, phi_k = (phi_{k-1} - 1/(k-1)!) / z."""
    if abs(z) < 1:
        return sum(z**i / math.factorial(i + k) for i in range(18))
    return math.exp(z) if k == 0 else (_phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


_RULES = [
    StepRule("sde", "em", "EM", partial(_linear, em_sde), "time", -20.0),
    StepRule("sde", "ddpm", "DDPM ancestral", partial(_linear, ddpm), "snr"),
    StepRule("sde", "dpmpp_2m", "DPM-Solver++(2M)", partial(_linear, ddpm, multistep=True), "snr"),
    StepRule("ode", "em", "EM", partial(_linear, em_ode), None),
    StepRule("ode", "ddim", "DDIM", partial(_linear, ddim), None),
    StepRule("ode", "dpmpp_2m", "DPM-Solver++(2M)", partial(_linear, ddim, multistep=True), None),
    StepRule("ode", "heun", "Heun", heun, None, -20.0),
    StepRule("ode", "unipc", "UniPC", unipc, None),
]
STEP_RULES = {rule.key: rule for rule in _RULES}
# DPM-Solver++(2M): its smooth errors are of second order, those from the noise nearly uncorrelated with a coarser
# grid's. Grids even in a flow's t end with ever longer steps in log-SNR, where it would extrapolate too far
REFERENCE_RULE = {
    dynamics: replace(
        STEP_RULES[f"{dynamics}/dpmpp_2m"], evaluations=partial(_linear, rule, multistep=True, longest=1 + 1e-6)
    )
    for dynamics, rule in (("sde", ddpm), ("ode", ddim))
}
STEP_RULE_NAMES = {rule.name: rule.label for rule in _RULES}
DYNAMICS_NAMES = {"sde": "stochastic (SDE)", "ode": "deterministic (ODE)"}


def step_rule(dynamics: str, name: str | None = None) -> StepRule:
    """The step rule of a key such as "sde/ddpm", or of a dynamics and a name; UserError if there is none."""
    key = dynamics if name is None else f"{dynamics}/{name}"
    if key not in STEP_RULES:
        raise UserError(f"The step rule {key} is unknown; expected one of {', '.join(STEP_RULES)}.")
    return STEP_RULES[key]
