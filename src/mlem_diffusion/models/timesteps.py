"""Timesteps: indices into the alphas_cumprod of a network's training, as functions of log-SNR."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

TOLERANCE = 1e-3  # in log-SNR, at the ends of the trained range: float32 tables are rounded
CLAMPED = 2.0**-24  # diffusers' stand-in for the zero at the end of alphas_cumprod (zero terminal SNR)


def timestep_table(source: Any) -> tuple[Tensor, int]:
    """Ascending log-SNRs of consecutive timesteps, without infinite ones (zero terminal SNR), and the last timestep."""
    values = getattr(source, "alphas_cumprod", source)
    try:
        values = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
        alpha2 = np.array(values, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        other = "adapt() takes EDM denoisers D(y, sigma): prediction='x0', coordinates='ve', time='sigma'"
        raise UserError(f"{type(source).__name__} has no alphas_cumprod; {other}.") from error
    if alpha2.ndim == 1 and len(alpha2) and alpha2[-1] == CLAMPED:
        alpha2[-1] = 0
    if alpha2.ndim != 1 or len(alpha2) < 2 or not np.all(np.diff(alpha2) < 0) or alpha2[0] > 1 or alpha2[-1] < 0:
        text = "alphas_cumprod must fall from timestep to timestep within [0, 1], with two values or more"
        raise UserError(f"{text}, in float32 at least.")
    timestep = np.flatnonzero((alpha2 > 0) & (alpha2 < 1))[::-1]
    return torch.from_numpy(np.log(alpha2[timestep]) - np.log1p(-alpha2[timestep])), int(timestep[0])


def fractional_timestep(name: str, logsnr: Tensor, table: tuple[Tensor, int]) -> Tensor:
    """Fractional timesteps [B]; UserError outside the trained range."""
    lowest, highest = float(table[0][0]), float(table[0][-1])
    outside = logsnr[~((logsnr >= lowest - TOLERANCE) & (logsnr <= highest + TOLERANCE))]  # NaN too
    if len(outside):
        text = f"{name}: a log-SNR of {float(outside[0]):.4g} is outside {lowest:.4g} .. {highest:.4g}"
        raise UserError(f"{text}, the range of its training; set logsnr_min and logsnr_max of the Process within it.")
    known = table[0].to(logsnr)
    above = torch.searchsorted(known, logsnr.detach().contiguous()).clamp(1, len(known) - 1)
    return table[1] - (above - 1 + ((logsnr - known[above - 1]) / (known[above] - known[above - 1])).clamp(0, 1))
