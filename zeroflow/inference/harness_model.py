"""A model of zeroflow for lm-evaluation-harness."""

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from zeroflow.inference import scoring
from zeroflow.inference.scoring import Request
from zeroflow.inference.trained import Trained
from zeroflow.training.sampling import SamplingConfig

_NEW_TOKENS = 256
"""Maximum number of generated tokens if a task sets none, as for the harness's own models."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the requests of the harness with the weights of a checkpoint.

    As in training, and as in an export to Hugging Face, a text begins after an end-of-text token.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self._trained = trained
        self._encoder = trained.tokenizer.load()

    @property
    def eot_token_id(self) -> int:
        return self._trained.tokenizer.end_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of `string`, after an end-of-text token unless that is not wanted."""
        ids: list[int] = self._encoder.encode(string, add_special_tokens=False).ids
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text; long ones in windows without overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            [text] = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(
                ids, self.eot_token_id, self._trained.context, context_len=1
            ):
                context, continuation = make_disjoint_window(window)
                windows.append(Request([*context, *continuation], len(continuation)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, scored in zip(owners, scoring.score(self._trained.model, windows), strict=True):
            sums[number] -= scored.nats
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        most = self._trained.context + 1
        asked = [
            Request([*context, *continuation][-most:], min(len(continuation), most - 1))
            for _, context, continuation in requests
        ]
        scores = scoring.score(self._trained.model, asked)
        return [(-found.nats, found.greedy) for found in scores]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the first of its stop strings."""
        return [self._continuation(*request.args) for request in requests]

    def _continuation(self, context: str, asked: dict[str, Any]) -> str:
        until = asked.get("until", [])
        stops = [until] if isinstance(until, str) else until
        config = SamplingConfig(
            tokens=asked.get("max_gen_toks", _NEW_TOKENS),
            temperature=asked.get("temperature", 1.0) if asked.get("do_sample") else 0.0,
            top_k=asked.get("top_k", 0),
        )
        return self._trained.generator.generate(context, config, [stop for stop in stops if stop])
