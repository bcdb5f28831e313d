"""HMT as the model "hmt" of lm-evaluation-harness, for whose tasks no context is too long.

On the command line: python -m hmt.harness run --model hmt --model_args pretrained=NAME,segment_length=512 --tasks ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hmt.generation import continue_prompt
from hmt.loading import load
from hmt.scoring import score

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("hmt.harness needs the package `lm-eval`: pip install lm-eval") from error


@register_model("hmt")
class HMTLM(TemplateLM):
    """What `hmt.loading.load` finds, asked one document at a time and never cut to a window.

    The scores are those of the model's forward pass over the whole text. With the paper's summary_source "current" a
    segment is recalled for by its own first half, so that a continuation has a part in what is recalled for it; with
    "previous" it has none.

    Args:
        pretrained: directory or hub name, as `--model` of the other commands.
        dtype: such as "bfloat16"; None or "auto" is the default of `hmt.loading.load`.
        max_gen_toks: longest answer where a task does not say.
        batch_size, max_batch_size: accepted, because the harness passes them, and not used.
        settings: fields of `HMTConfig`, such as segment_length.

    Example:
        >>> model = HMTLM("out", summary_source="previous")
        >>> lm_eval.simple_evaluate(model, tasks=["longbench_qasper"])
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        **settings: Any,
    ):
        super().__init__()
        self.name, self.max_gen_toks = pretrained, max_gen_toks
        if dtype == "auto":
            dtype = None
        chosen = None if dtype is None else getattr(torch, dtype, None)
        if dtype is not None and not isinstance(chosen, torch.dtype):
            raise ValueError(f"dtype must be a name such as 'bfloat16', 'auto' or None, got {dtype!r}")
        self.model, self.tokenizer, _ = load(pretrained, dtype=chosen, device=device, **settings)
        self._device = self.model.device

    @property
    def max_length(self) -> int:
        """Longest text that can be read, which the window does not limit."""
        return self.model.max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token that is predicted of a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begun = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)  # by a template
        special = add_special_tokens is not False and not begun
        return self.tokenizer(string, add_special_tokens=special, verbose=False).input_ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation after its context, and whether it is what greedy decoding predicts."""

        def scored(request: tuple[tuple[str, str], list[int], list[int]]) -> tuple[float, bool]:
            _, context, continuation = request
            kept = len(continuation) + 1
            logits = self.model(self._ids(context + continuation), logits_to_keep=kept).logits[0, :-1].float()
            right = torch.tensor(continuation, device=logits.device)
            likelihood = logits.log_softmax(-1).gather(1, right[:, None]).sum()
            return float(likelihood), bool((logits.argmax(-1) == right).all())

        return self._each("loglikelihood", requests, scored, lambda request: request[0], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of each whole text."""

        def scored(request: Any) -> float:
            ids = self._ids([self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)])
            return -sum(part.nll for part in score(self.model, ids))

        return self._each("loglikelihood_rolling", requests, scored, lambda request: request.args, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What is generated after each context, up to the first of its stop strings."""
        return self._each("generate_until", requests, self._generate, lambda request: request.args, disable_tqdm)

    def _generate(self, request: Any) -> str:
        context, options = request.args
        options = {"do_sample": False, **options}
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        options["max_new_tokens"] = options.pop("max_gen_toks", self.max_gen_toks)
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        ids = self._ids(self.tok_encode(context) or [self.prefix_token_id])
        if until:
            options.update(stop_strings=until, tokenizer=self.tokenizer)
        tokens = continue_prompt(self.model, self.tokenizer, ids, **options)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]

    def _each(
        self, kind: str, requests: Iterable[Any], answer: Callable, key: Callable, disable_tqdm: bool
    ) -> list[Any]:
        """The answer to each request, under a progress bar, kept in the harness's cache when it has one."""
        results = []
        for request in tqdm(requests, desc=kind, disable=disable_tqdm):
            results.append(answer(request))
            self.cache_hook.add_partial(kind, key(request), results[-1])
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
