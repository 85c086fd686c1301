"""The losses of the steps of a run, few enough to be drawn."""

from __future__ import annotations

import math


class StepLosses:
    """(epochs, loss) of every step at first, then of every second, fourth, ... one: at most `most` points.

    Each point is the mean of the steps since the one before, so that nothing is left out.
    """

    def __init__(self, most: int = 2000):
        self._most, self._every = most, 1
        self._sum, self._count = 0.0, 0
        self.points: list[tuple[float, float]] = []

    def add(self, epochs: float, loss: float) -> None:
        """A step has ended; a loss that is not finite leaves no point. A run that goes back takes its points back."""
        if self.points and epochs <= self.points[-1][0]:
            self.points = [point for point in self.points if point[0] < epochs]
            self._sum, self._count = 0.0, 0
        if not math.isfinite(loss):
            return
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self._every:
            return
        self.points.append((epochs, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self.points) >= self._most:
            self._halve()

    def _halve(self) -> None:
        """Two points become one; the last of an odd number waits for its next one."""
        if len(self.points) % 2:
            self._sum, self._count = self.points.pop()[1] * self._every, self._every
        pairs = zip(self.points[::2], self.points[1::2], strict=True)
        self.points = [(later, (first + second) / 2) for (_, first), (later, second) in pairs]
        self._every *= 2

    def smoothed(self) -> list[tuple[float, float]]:
        """The exponential moving average over about a tenth of the points, twenty at most.

        It is free of the bias of its first ones (Kingma & Ba 2014, arXiv 1412.6980, section 3).
        """
        weight = 1 - 1 / min(20, max(1, len(self.points) / 10))
        found, mean, share = [], 0.0, 0.0
        for epochs, loss in self.points:
            mean, share = weight * mean + (1 - weight) * loss, weight * share + (1 - weight)
            found.append((epochs, mean / share))
        return found
