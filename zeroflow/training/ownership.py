"""One process at a time works on a run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.training.failures import RunIsBusy


@contextmanager
def exclusive(lock: Path, busy: str) -> Iterator[None]:
    """Hold `lock` until the block ends, or fail at once.

    Raises:
        RunIsBusy: another process holds it; the message begins with `busy`.
    """
    with ExitStack() as held:
        try:
            held.enter_context(artifacts.exclusive(lock, timeout_seconds=0))
        except TimeoutError as error:
            raise RunIsBusy(f"{busy}: wait for its end, or use another --run-name") from error
        yield


@contextmanager
def ownership() -> Iterator[Callable[[Path], None]]:
    """Yield a function that makes a run's directory this process's own until the block ends.

    It raises `RunIsBusy` if another process owns the directory. The end of a process, whatever its
    cause, frees what it owned.
    """
    with ExitStack() as held:
        owned: set[Path] = set()

        def acquire(run_dir: Path) -> None:
            if run_dir not in owned:
                busy = f"another process is at work on run {run_dir.name}"
                held.enter_context(exclusive(RunFolder(run_dir).owner_lock, busy))
                owned.add(run_dir)

        yield acquire
