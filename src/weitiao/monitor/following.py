"""Everything that follows a training, from its begin to its end, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..recipe import Recipe
from ..runs import RunFolder
from .base import Ending
from .several import Monitors, start_monitors, without_secrets
from .state import Attendance, leads


@contextmanager
def following(
    recipe: Recipe, run: RunFolder, *, resume: bool, say: Callable[[str], None]
) -> Iterator[tuple[Attendance | Monitors, ...]]:
    """What `train` is to tell of a training of `run`: the keeper of its state, and the monitors of `recipe`.

    Of several processes that train one run, the first tells for all of them.

    Raises:
        RunError: the run is being trained already, or a monitor of a new run cannot be started.
    """
    if not leads():
        yield ()
        return
    attendance, monitors = Attendance(run, say=say), Monitors(())
    ending: Ending = "failed"
    reason = ""
    try:
        monitors = start_monitors(recipe.monitor, run, recipe, resume=resume, say=say)
        yield attendance, monitors
        ending = "finished"
    except (KeyboardInterrupt, SystemExit):
        ending = "interrupted"
        raise
    except BaseException as error:
        reason = without_secrets(str(error)).partition("\n")[0] or type(error).__name__
        raise
    finally:
        try:
            monitors.finish(ending)
        finally:
            attendance.finish(ending, reason)
