"""Locks that allow only one process at a time to work on a run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from zeroflow import artifacts
from zeroflow.run_folder import RunFolder
from zeroflow.training.failures import RunIsBusy


@contextmanager
def exclusive(lock: Path, busy: str) -> Iterator[None]:
    """Hold `lock` until the block ends, or fail immediately.

    Raises:
        RunIsBusy: another process holds the lock; the message begins with `busy`.
    """
    with ExitStack() as held:
        try:
            held.enter_context(artifacts.exclusive(lock, waiting_for=None))
        except BlockingIOError as error:
            raise RunIsBusy(f"{busy}: wait until it ends, or use another --run-name") from error
        yield


@contextmanager
def ownership() -> Iterator[Callable[[Path], None]]:
    """Yield a function that gives this process ownership of a run's directory until the block ends.

    It raises `RunIsBusy` if another process owns the directory. The kernel releases the locks of a
    process that ends, even if it is killed.
    """
    with ExitStack() as held:
        owned: set[Path] = set()

        def acquire(run_dir: Path) -> None:
            if run_dir not in owned:
                busy = f"another process is working on run {run_dir.name}"
                held.enter_context(exclusive(RunFolder(run_dir).owner_lock, busy))
                owned.add(run_dir)

        yield acquire
