"""Differential privacy of single examples: bounded gradients, noise, and what a client has spent by now."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.core.registry import Options, option
from flora.core.rng import Rng
from flora.core.tree import State
from flora.privacy.accounting import ACCOUNTANTS, spent_epsilon

NUM_RELEASES = "num_releases"
"""The one tensor of a client's `ClientState.privacy`, `(1,)`."""


@dataclass(frozen=True)
class Exposure:
    """What a client has sent: `num_releases` sums of bounded gradients with noise, of which an example is in each.

    Or it is in each with the probability `sampling_fraction`, independently of everything else; None without sampling.
    """

    num_releases: int
    sampling_fraction: float | None


@dataclass(frozen=True)
class ExamplePrivacy(Options):
    """DP-SGD at every client, so that what it sends tells little of any one of its examples (arXiv:1607.00133).

    A step's gradient is the sum of its examples' gradients, each scaled down to a norm of at most `clip_norm` over all
    that is trained, plus Gaussian noise, divided by the expected number of examples. Two data sets are neighbours if
    one has what the other has and one example more at one client; how many examples a client has counts as known, since
    it says how many steps there are and how likely each example is drawn. Differs from the paper: the gradient then
    goes to any optimiser, which is post-processing. The noise is seeded: fit for research, not for protecting anybody.
    """

    clip_norm: float = option("largest norm of an example's gradient", 1.0, above=0)
    noise_multiplier: float = option("standard deviation of a step's noise, over `clip_norm`", 1.0, above=0)
    delta: float = option(
        "probability with which the guarantee may fail, at which epsilon is stated", 1e-5, above=0, below=1
    )
    sampling: str = option(
        "how a step's examples are drawn: each by itself, with probability batch_size / examples (poisson), by which "
        "epsilon is smaller; or whole epochs in random order (shuffled), for which nothing is gained by chance",
        "poisson",
        choices=("poisson", "shuffled"),
    )
    accountant: str = option(
        "how epsilon is computed: pld is tighter, rdp quicker where clients have many different sizes",
        "pld",
        choices=ACCOUNTANTS,
    )

    def clipped_sums(self, gradients: Tensor, mask: Tensor) -> Tensor:
        """Return the sums `(K, P)` of each client's `gradients` `(K, n, P)`, scaled down where they are too long.

        Those where `mask` `(K, n)` is False count nothing, whatever they are.
        """
        gradients = gradients.masked_fill(~mask.unsqueeze(-1), 0.0)
        factors = self.factors(torch.linalg.vector_norm(gradients, dim=-1))
        return torch.bmm(factors.unsqueeze(1), gradients).squeeze(1)

    def factors(self, norms: Tensor) -> Tensor:
        """Return the factors by which gradients of these norms are scaled, of their shape: 1 within the bound."""
        return self.clip_norm / norms.clamp(min=self.clip_norm)

    def noise(self, like: Tensor, rng: Rng) -> Tensor:
        """Return the noise `(P,)` of a sum such as `like`, from the stream `rng`: drawn in single precision."""
        drawn = torch.empty(len(like)).normal_(generator=rng.torch())
        return drawn.to(like) * (self.clip_norm * self.noise_multiplier)

    def sampling_fraction(self, num_examples: int, batch_size: int) -> float | None:
        """The probability with which a step sees an example of a client of `num_examples`; None without sampling."""
        return min(batch_size / num_examples, 1.0) if self.sampling == "poisson" else None

    def num_releases(self, num_examples: int, batch_size: int, num_steps: int) -> int:
        """Return how many of a client's steps in a round may see any one example.

        Poisson samples may always; an epoch of shuffled batches sees each example once.
        """
        return num_steps if self.sampling == "poisson" else -(-num_steps // -(-num_examples // batch_size))

    def epsilon(self, exposure: Exposure) -> float:
        """Return the epsilon at `delta` of what a client has sent. Raises `UserError` without the extra `[privacy]`."""
        return self._epsilon(exposure, self.accountant)

    def largest_epsilon(self, exposures: Iterable[Exposure]) -> float:
        """Return the largest epsilon of some clients, 0 of none; it takes the quick bound to find out whose that is."""
        quick = functools.partial(self._epsilon, accountant="rdp")
        largest = 0.0
        for exposure in sorted(set(exposures), key=quick, reverse=True):
            if quick(exposure) <= largest:
                break
            largest = max(largest, self.epsilon(exposure))
        return largest

    def _epsilon(self, exposure: Exposure, accountant: str) -> float:
        return spent_epsilon(
            self.noise_multiplier, exposure.num_releases, exposure.sampling_fraction, self.delta, accountant
        )

    @staticmethod
    def counted(num_releases: int) -> State:
        """The state that a client carries from round to round: the number of its releases."""
        return {NUM_RELEASES: torch.tensor([num_releases], dtype=torch.float64)}
