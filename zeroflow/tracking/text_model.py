"""The program of a model in MLflow, which opens an exported folder with transformers.

MLflow copies this file into each logged model and executes it where the model is loaded, so it
imports nothing of zeroflow.
"""

import warnings
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

# Recorded instead of shown: MLflow asks for the type of the prompts. With a type, it would accept
# no parameters
with warnings.catch_warnings(record=True):

    class TextModel(PythonModel):
        """Continues texts."""

        def load_context(self, context: PythonModelContext) -> None:
            from transformers import pipeline

            self._pipeline = pipeline("text-generation", context.artifacts["model"])

        def predict(  # type: ignore[no-untyped-def]
            self, context: PythonModelContext, model_input, params: dict[str, Any] | None = None
        ) -> list[str]:
            """Return each prompt with its continuation.

            Args:
                model_input: a table whose first column has the prompts, as MLflow makes it of a
                    text, of several, and of a request to its server.
                params: settings of transformers' text generation.
            """
            prompts = model_input.iloc[:, 0].tolist()
            given = dict(params or {})
            if not given.get("temperature", 1):  # zero, which transformers refuses
                given["do_sample"] = False
            if not given.get("do_sample", True):
                given |= {"temperature": None, "top_k": None, "top_p": None}  # have no effect then
            return [found[0]["generated_text"] for found in self._pipeline(prompts, **given)]


set_model(TextModel())
