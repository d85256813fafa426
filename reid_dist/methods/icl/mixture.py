"""Two Gaussians over one loss, fitted by expectation maximisation (consensus division of RDE, methods/icl.md section 2).

Plain NumPy in float64, the same on every machine: start from a 2-means on the extremes, then EM until the mean log-likelihood
moves by less than `tolerance`. Agrees with scikit-learn's GaussianMixture as far as the golden vectors tell (1e-3 is asked).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_TINY = 10 * np.finfo(np.float64).eps  # keeps an empty component's weight above 0


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """How exactly a mixture is fitted."""

    iterations: int
    tolerance: float  # of the mean log-likelihood
    floor: float  # added to variances


TIGHT = MixtureSettings(iterations=100, tolerance=1e-4, floor=1e-6)
LOOSE = MixtureSettings(iterations=10, tolerance=1e-2, floor=5e-4)


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Two components, the one of the smaller mean first."""

    weight: np.ndarray  # [2]
    mean: np.ndarray
    variance: np.ndarray

    def log_joint(self, values: np.ndarray) -> np.ndarray:
        """log weight + log density of each component, [N, 2]."""
        squared = (values[:, None] - self.mean) ** 2 / self.variance
        joint: np.ndarray = np.log(self.weight) - 0.5 * (np.log(2 * np.pi * self.variance) + squared)
        return joint

    def low(self, values: np.ndarray) -> np.ndarray:
        """[N]: posterior probability of the component with the smaller mean."""
        joint = self.log_joint(values)
        posterior: np.ndarray = np.exp(joint[:, 0] - np.logaddexp(joint[:, 0], joint[:, 1]))
        return posterior


def _two_means(values: np.ndarray) -> np.ndarray:
    """bool [N]: members of the upper of two clusters, by Lloyd's iteration from the extremes."""
    centres = np.array([values.min(), values.max()])
    while True:
        upper = values > centres.mean()
        moved = np.array([values[~upper].mean(), values[upper].mean()])
        if np.array_equal(moved, centres):
            return upper
        centres = moved


def _maximise(values: np.ndarray, share: np.ndarray, floor: float) -> Mixture:
    """Parameters for responsibilities `share` [N, 2]."""
    size = share.sum(axis=0) + _TINY
    mean = (share * values[:, None]).sum(axis=0) / size
    variance = (share * (values[:, None] - mean) ** 2).sum(axis=0) / size + floor
    return Mixture(size / size.sum(), mean, variance)


def fit_two_gaussians(values: np.ndarray, settings: MixtureSettings) -> Mixture:
    """values float64 [N], not all the same. Raises ValueError when they are, or one is not a number."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() == values.max():
        raise ValueError("a mixture needs finite values that are not all the same")
    upper = _two_means(values)
    mixture = _maximise(values, np.stack([~upper, upper], axis=1).astype(np.float64), settings.floor)
    before = -np.inf
    for _ in range(settings.iterations):
        joint = mixture.log_joint(values)
        total = np.logaddexp(joint[:, 0], joint[:, 1])
        mixture = _maximise(values, np.exp(joint - total[:, None]), settings.floor)
        now = float(total.mean())
        if abs(now - before) < settings.tolerance:
            break
        before = now
    order = np.argsort(mixture.mean, kind="stable")
    return Mixture(mixture.weight[order], mixture.mean[order], mixture.variance[order])
