"""Code of a registered model in MLflow: opens an exported folder with transformers.

MLflow copies this file into each logged model and executes it where the model is loaded, so it
imports nothing of zeroflow.
"""

import warnings
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

# Not shown: MLflow warns that `predict` has no type hint for its input. With one, MLflow would
# accept no `params`
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
                model_input: a DataFrame with the prompts in its first column; MLflow converts a
                    string, a list of strings or a request to its server to this form.
                params: settings of transformers' text generation.
            """
            prompts = model_input.iloc[:, 0].tolist()
            given = dict(params or {})
            if not given.get("temperature", 1):  # zero, which transformers refuses
                given["do_sample"] = False
            if not given.get("do_sample", True):
                given |= {"temperature": None, "top_k": None, "top_p": None}  # not used then
            return [found[0]["generated_text"] for found in self._pipeline(prompts, **given)]


set_model(TextModel())
