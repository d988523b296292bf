"""Rules for keeping checkpoints, and the removal of the others."""

import logging
import math
import shutil
from pathlib import Path

from pydantic import PositiveInt

from zeroflow.config import Config
from zeroflow.training.checkpoint import best, complete, step_of

log = logging.getLogger(__name__)


class Retention(Config):
    """Rules for keeping checkpoints. The one with the lowest validation loss is always kept."""

    keep: PositiveInt
    """Number of the newest checkpoints to keep."""

    keep_every: PositiveInt | None = None
    """Also keep checkpoints at multiples of this many steps; None keeps no others."""

    def most_at_once(self, steps: int, *, every: int) -> int:
        """Return the maximum number of checkpoints of a run that exist at the same time.

        Args:
            steps: steps of the run.
            every: interval of its checkpoints.
        """
        kept = self.keep
        if self.keep_every:
            kept += steps // math.lcm(every, self.keep_every)
        return min(-(-steps // every), kept + 2)  # the best one and the one being written

    def keeps_forever(self, step: int) -> bool:
        """Return True if the checkpoint of this step is never removed."""
        return self.keep_every is not None and step % self.keep_every == 0


def retire(folder: Path, retention: Retention) -> None:
    """Remove the checkpoints that `retention` does not keep."""
    steps = {step_of(path): path for path in complete(folder)}
    stay = set(sorted(steps)[-retention.keep :])
    stay |= set(filter(retention.keeps_forever, steps))
    if (best_one := best(folder)) is not None:
        stay.add(step_of(best_one))
    for step in steps.keys() - stay:
        try:
            _remove(steps[step])
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", steps[step], error)


def _remove(path: Path) -> None:
    if path.is_symlink():  # the user moved the checkpoint elsewhere and left a link
        path.unlink()
    else:
        shutil.rmtree(path)
