from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved within the test, in their order; they are saved as well."""
    found: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, path: Path, **how: Any) -> None:
        found.append(figure)
        save(figure, path, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found
