"""Needles in a haystack: facts hidden in any text, one of which is asked for after growing distances.

Each context holds "The password of KEY is VALUE." for one or several keys, every fact in a segment of its own. Then the
next segment asks for one of them, `distance` segments after it was stated. All contexts of a trial are of equal length
and hide the same facts, so that nothing but the distance differs; with several keys the others distract. A model whose
summary_source is "previous" recalls for the question by the segment before it, which knows nothing of the question.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hmt.model import HMTForCausalLM
from hmt.modes import reading_as

FACT, QUESTION = " The password of {key} is {value}.", "\nThe password of {key} is"
KEYS = (
    "Avonlea Bergen Cadiz Dover Exeter Florence Geneva Halifax Ipswich Jaipur Kyoto Lisbon Madrid Naples Oxford Prague "
    "Quebec Rotterdam Salem Toledo Utrecht Vienna Warsaw Yalta Zurich"
)
VALUES = (
    "amber butter copper daisy ebony fern granite hazel ivory jasmine kelp linen maple nickel olive pearl quartz ruby "
    "silver topaz umber velvet walnut yarrow zinc"
)


@dataclass(frozen=True)
class Trial:
    """One haystack with its needles at several distances.

    Attributes:
        contexts: [D, T] token ids, one row per distance.
        question: [Q] token ids up to where the choices begin to differ.
        choices: [C] next tokens, the right one first; those of the other facts in the text come next.
        answer: the tokens of the right answer.
    """

    contexts: Tensor
    question: Tensor
    choices: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Recalled:
    """What came out of N trials at D distances.

    Attributes:
        chosen: [N, D] whether the right value was the likeliest of all choices.
        exact: [N, D] whether greedy decoding gave the whole answer.
        nats: [N, D] negative log likelihood of the first token that tells the right value.
    """

    chosen: Tensor
    exact: Tensor
    nats: Tensor


def make_trial(
    haystack: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    distances: Sequence[int],
    segment_length: int,
    rng: random.Random,
    *,
    num_keys: int = 1,
    num_choices: int = 10,
    margin: int = 0,
) -> Trial:
    """Facts about `num_keys` keys in a random stretch of the haystack [T], the asked one at each of the distances.

    Args:
        distances: in segments; 1 states the fact in the segment before the question.
        margin: tokens at the end of a segment that hold no fact, so that sensory memory does not show it.

    Raises:
        ValueError: distances below 1, more keys than segments or names, a haystack or segments that are too short.
    """
    if not distances or min(distances) < 1:
        raise ValueError(f"distances must be integers >= 1, got {list(distances)}")
    segments = max(distances) + 1
    names = KEYS.split()
    if not 1 <= num_keys <= min(segments, len(names)):
        raise ValueError(f"num_keys must lie in [1, {min(segments, len(names))}] for this distance, got {num_keys}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    keys = rng.sample(names, num_keys)
    values, answers, shared = _values(encode, max(num_keys, num_choices), rng)
    facts = [torch.tensor(encode(FACT.format(key=k, value=v))) for k, v in zip(keys, values, strict=False)]
    room = segment_length - margin - max(map(len, facts))
    if room < 0:
        raise ValueError(
            f"segments must have {max(map(len, facts)) + margin} tokens to hold a fact, got {segment_length}"
        )
    length = segments * segment_length - sum(map(len, facts))
    if len(haystack) < length:
        raise ValueError(f"the text must have {length} tokens for a distance of {max(distances)}, got {len(haystack)}")
    start = rng.randrange(len(haystack) - length + 1)
    hay, positions = haystack[start : start + length], [rng.randrange(room + 1) for _ in facts]
    order = rng.sample(
        range(segments), segments
    )  # where the other facts go, the same for all distances as far as can be
    rows = []
    for distance in distances:
        asked = segments - distance
        others = [segment for segment in order if segment != asked]
        rows.append(
            _hide(
                hay,
                dict(zip([asked, *others], zip(facts, positions, strict=True), strict=False)),
                segments,
                segment_length,
            )
        )
    question = torch.tensor(encode(QUESTION.format(key=keys[0])) + shared)
    choices = torch.tensor([answer[len(shared)] for answer in answers])
    return Trial(torch.stack(rows), question, choices, torch.tensor(answers[0][len(shared) :]))


def _values(encode: Any, count: int, rng: random.Random) -> tuple[list[str], list[list[int]], list[int]]:
    """`count` values, their tokens, and the tokens that all begin with; the token after these differs for each."""
    tokens = {value: encode(" " + value) for value in VALUES.split()}
    shared = [
        column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*tokens.values(), strict=False))
    ]
    chosen: dict[int, str] = {}
    for value in rng.sample(list(tokens), len(tokens)):
        if len(tokens[value]) > len(shared):
            chosen.setdefault(tokens[value][len(shared)], value)
    values = list(chosen.values())[:count]
    if len(values) < count:
        raise ValueError(f"the tokenizer must tell {count} of the values apart by one token, got {len(values)}")
    return values, [tokens[value] for value in values], shared


def _hide(hay: Tensor, facts: Mapping[int, tuple[Tensor, int]], segments: int, segment_length: int) -> Tensor:
    """The hay cut into segments, each with its fact at its position; every segment is as long."""
    parts, used = [], 0
    for segment in range(segments):
        fact, position = facts.get(segment, (hay[:0], 0))
        stop = used + segment_length - len(fact)
        parts += [hay[used : used + position], fact, hay[used + position : stop]]
        used = stop
    return torch.cat(parts)


@torch.no_grad()
def recall_needles(
    model: HMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Tensor,
    distances: Sequence[int],
    *,
    num_keys: int = 1,
    num_choices: int = 10,
    trials: int = 20,
    seed: int = 0,
    mode: str | None = None,
    summary_source: str | None = None,
) -> Iterator[Recalled]:
    """Read the contexts of every trial, ask, and yield what all trials so far gave.

    Trial i depends on haystack, tokenizer and seed alone: all models and modes with one tokenizer see the same texts.

    Raises:
        ValueError: as `make_trial`; a mode that the model cannot read in.
    """
    config = model.config
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(trials):
        trial = make_trial(
            haystack,
            tokenizer,
            distances,
            config.segment_length,
            random.Random(f"{seed} {number}"),
            num_keys=num_keys,
            num_choices=num_choices,
            margin=config.num_sensory,
        )
        with reading_as(model, mode, summary_source):
            results.append(_ask(model, trial))
        yield Recalled(*(torch.stack(column) for column in zip(*results, strict=True)))


def _ask(model: HMTForCausalLM, trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    state = model.read(trial.contexts.to(model.device))
    question = trial.question.expand(len(trial.contexts), -1).to(model.device)
    out = model.generate(
        question,
        attention_mask=torch.ones_like(question),
        state=state,
        max_new_tokens=len(trial.answer),
        min_new_tokens=len(trial.answer),
        do_sample=False,
        repetition_penalty=1.0,  # the answer is in what was read
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = out.logits[0].float().cpu()
    chosen = logits[:, trial.choices].argmax(1) == 0
    exact = (out.sequences[:, question.shape[1] :].cpu() == trial.answer).all(1)
    return chosen, exact, -logits.log_softmax(1)[:, trial.choices[0]]


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of right answers (Wilson, 1927), which holds near 0 and 1 as well."""
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def report(
    results: Mapping[str, Recalled], distances: Sequence[int], segment_length: int, num_keys: int, num_choices: int
) -> dict[str, Any]:
    """Shares of right answers by reading and distance, with their intervals, as what JSON can hold."""

    def shares(right: Tensor) -> dict[str, list]:
        counts, asked = right.sum(0).tolist(), len(right)
        return {"share": [n / asked for n in counts], "interval": [list(wilson(n, asked)) for n in counts]}

    return {
        "task": "needle",
        "segment_length": segment_length,
        "distances": list(distances),
        "keys": num_keys,
        "choices": max(num_choices, num_keys),
        "readings": {
            name: {
                "trials": len(found.chosen),
                "chosen": shares(found.chosen),
                "exact": shares(found.exact),
                "nats": found.nats.mean(0).tolist(),
            }
            for name, found in results.items()
        },
    }


def draw(found: dict[str, Any], figure: Any) -> None:
    """Share of right choices (lines, with intervals) and of whole answers (dashed) against the distance."""
    axes = figure.subplots()
    distances = found["distances"]
    for name, reading in found["readings"].items():
        (line,) = axes.plot(distances, reading["chosen"]["share"], marker=".", label=name)
        low, high = zip(*reading["chosen"]["interval"], strict=True)
        axes.fill_between(distances, low, high, color=line.get_color(), alpha=0.15)
        axes.plot(distances, reading["exact"]["share"], color=line.get_color(), linestyle="--", linewidth=0.8)
    axes.axhline(1 / found["choices"], color="gray", linestyle=":", label="guessing")
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [str(d) for d in distances])
    axes.set(xlabel="segments since the fact was read", ylabel="right choices (dashed: whole answers)", ylim=(0, 1.02))
    axes.legend()
