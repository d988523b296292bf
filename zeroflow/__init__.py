"""zeroflow: raw web text to a trained, checked and comparable LLaMA-style language model."""

import os

# Arrow's own allocator gives pages back to the system and takes them again, which took a tenth of
# the time of a build. It is chosen as pyarrow is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
