"""Stochastic churn: noise added before a step, which takes out what earlier steps did wrong."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from microdit_jax.errors import UserError
from microdit_jax.sampling.schedules import Levels


class Churn(NamedTuple):
    """Numbers of EDM's stochastic sampler (Karras et al. 2022, Algorithm 2).

    Attributes:
      amount: S_churn, noise added over all steps, as a number of steps; 0 for none.
      low, high: S_tmin and S_tmax, noise levels between which it is added.
      noise: S_noise, deviation of what is added.
    """

    amount: float
    low: float = 0.05
    high: float = 50.0
    noise: float = 1.003

    def check(self) -> None:
        """Raises UserError for numbers out of their range."""
        finite = bool(np.isfinite(self).all())
        if not finite or self.amount < 0 or not 0 <= self.low < self.high or self.noise <= 0:
            found = ", ".join(f"{value:g}" for value in self)
            raise UserError(
                "churn must be four finite numbers S_churn >= 0, 0 <= S_tmin < S_tmax and S_noise "
                f"> 0, found {found}"
            )

    def raised(
        self, levels: Levels, num_steps: int
    ) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Returns each step's raised level sigma-hat, and the deviation of the noise it takes.

        Args:
          levels: (n + 1,), falling to 0.
          num_steps: N of the paper, of the whole schedule.
        """
        now = levels[:-1]
        acts = (self.low <= now) & (now <= self.high)
        gamma = np.where(acts, min(self.amount / num_steps, np.sqrt(2) - 1), 0.0)
        hats = now * (1 + gamma)
        return hats, np.sqrt(hats**2 - now**2) * self.noise
