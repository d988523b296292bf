"""zeroflow: from raw web text to a trained, checked and comparable LLaMA-style language model.

from zeroflow import RunConfig, load, pretrain

report = pretrain(RunConfig(run_name="mine", model={"size": "tiny"}))
print(load("mine").generate("The sea"))
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Libraries read these when they are imported. Arrow's own allocator returns pages to the system and
# requests them again, which took a tenth of the build time
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from zeroflow.api import load as load
    from zeroflow.api import pretrain as pretrain
    from zeroflow.data.rows import Rows as Rows
    from zeroflow.inference.trained import Trained as Trained
    from zeroflow.settings.run_config import RunConfig as RunConfig

# Modules of the public names, imported at first use, because a training process needs few of them
_PUBLIC = {
    "RunConfig": "zeroflow.settings.run_config",
    "Rows": "zeroflow.data.rows",
    "Trained": "zeroflow.inference.trained",
    "load": "zeroflow.api",
    "pretrain": "zeroflow.api",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
