"""Settings of a Hierarchical Memory Transformer around any causal language model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hmt.state_file import digest_of_fields, write_whole
from hmt_kernels.checks import MAX_RECALL_DIM, MAX_RECALL_SLOTS

MODES = ("hmt", "rmt", "baseline")
SUMMARY_SOURCES = ("current", "previous")
DIGEST = "sha256"  # of all other fields of a config.json


def embedding_width(text_config: PreTrainedConfig) -> int:
    """Width d of a token embedding, which is also the width of a memory (OPT: word_embed_proj_dim)."""
    return getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size


class HMTConfig(PreTrainedConfig):
    """Everything that the recurrence of arXiv 2405.06067 needs to know beside the backbone's own config.

    Args:
        text_config: the backbone's config (any decoder-only model of transformers), or its dict.
        mode: "hmt" (recall from a queue), "rmt" (only the last memory is passed on) or "baseline" (no memory).
        segment_length: tokens L of one segment.
        num_sensory: tokens k of the previous segment that are read again in front of a segment.
        queue_size: memories N kept for recall; the oldest is forgotten first.
        summary_fraction: part f of a segment that its summary reads.
        summary_source: "current" summarises the first round(L f) tokens of the segment itself, as the paper does;
            "previous" the last round(L f) tokens of the one before, so that nothing ever sees a later token.
        recall_dim: width h of the recall projections; None means the embedding width d.
        recall_softmax_scale: scale of the recall scores; None means 1/sqrt(h). HMT-pytorch trained its
            checkpoints with d, h >= 4096 at 1/h. A model takes it when it is made; other settings may change later.
        fused_rotary: rotate queries and keys inside the attention kernel (see `hmt.fuse_rotary`). None does it where
            the backbone allows and a kernel gains by it, True everywhere or not at all (ValueError), False never.
        summary_batch_size: rows of one summary pass; larger is faster until the pass no longer fits caches or memory.
        loss_chunk_size: positions whose logits the loss holds at once.
        rematerialize: recompute all segments but a call's last in the backward pass, so that training holds the
            activations of one segment at any depth; off, all are kept.
        bptt_depth: segments that gradients flow through: at every bptt_depth-th segment of a text the memories of all
            earlier ones enter as constants. None means all segments of a call.
        offload_states: what rematerialisation keeps of a segment waits in CPU memory for the backward pass.
        cuda_graphs: read summaries and full segments by CUDA graphs, captured once per shape and replayed, which saves
            the launches that small models wait for on a GPU. None does it on CUDA for shapes that come again, in passes
            without gradients; True at once, and in training too, where it takes memory for a second set of the
            backbone's gradients; False never. Passes with padding, hooks or dropout always go without.
            An attribute that is set on a module after a capture (a scale, say) is not seen by it.
        compile_layers: compile the backbone's layers with torch.compile; one compilation serves all of them, and the
            first few passes wait for it. Not together with fused_rotary=True.

    A saved config.json holds a SHA-256 of its fields; who edits the file by hand takes that line out.

    Raises:
        ValueError: for a value outside its range, naming the argument; for a file that is damaged.

    Example:
        >>> from transformers import LlamaConfig
        >>> HMTConfig(text_config=LlamaConfig(), segment_length=512).queue_size
        300
    """

    model_type = "hmt"
    sub_configs: ClassVar = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar = ["state", "trace"]
    auto_map: ClassVar[dict[str, str]] = {}  # no code comes with the weights; TRL asks models of others

    text_config: dict | PreTrainedConfig | None = None
    mode: str = "hmt"
    segment_length: int = 512
    num_sensory: int = 32
    queue_size: int = 300
    summary_fraction: float = 0.5
    summary_source: str = "current"
    recall_dim: int | None = None
    recall_softmax_scale: float | None = None
    fused_rotary: bool | None = None
    summary_batch_size: int = 8
    loss_chunk_size: int = 256
    rematerialize: bool = True
    bptt_depth: int | None = None
    offload_states: bool = False
    cuda_graphs: bool | None = None
    compile_layers: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[fields.pop("model_type", "llama")](**fields)
        elif self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"]()
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        kwargs.pop(DIGEST, None)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> HMTConfig:
        """The config of a dict, which may come from a file."""
        fields = dict(config_dict)
        if (kind := fields.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"this is no HMT but a model of type {kind!r}: HMTForCausalLM.from_backbone(AutoModelForCausalLM."
                "from_pretrained(...)) or hmt.loading.load makes one of it"
            )
        fields.pop("_commit_hash", None)  # older transformers add it to what they have read
        if (expected := fields.pop(DIGEST, None)) is not None and expected != digest_of_fields(fields):
            raise ValueError(
                f"config.json of this HMT is damaged: its fields do not match its {DIGEST} (if they were edited on "
                f"purpose, remove the line {DIGEST!r})"
            )
        return super().from_dict(fields, **kwargs)

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write a config.json with a digest of its fields, whole or not at all; none that could not be loaded again."""
        self.check()
        fields = json.loads(self.to_json_string(use_diff))
        fields[DIGEST] = digest_of_fields(self._decode_special_floats(fields))
        write_whole(Path(json_file_path), (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())

    def check(self) -> None:
        """Raise a ValueError for a setting outside its range: they may have been set since this was made."""
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.summary_source not in SUMMARY_SOURCES:
            raise ValueError(f"summary_source must be one of {SUMMARY_SOURCES}, got {self.summary_source!r}")
        for name in ("segment_length", "num_sensory", "queue_size", "summary_batch_size", "loss_chunk_size"):
            value, low = getattr(self, name), 0 if name == "num_sensory" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if self.fused_rotary is not None and not isinstance(self.fused_rotary, bool):
            raise ValueError(f"fused_rotary must be True, False or None, got {self.fused_rotary!r}")
        if self.num_sensory > self.segment_length:
            raise ValueError(
                f"num_sensory must not exceed segment_length ({self.segment_length}), got {self.num_sensory}"
            )
        for name in ("summary_fraction", "recall_softmax_scale"):
            value = getattr(self, name)
            if value is None and name == "recall_softmax_scale":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not 0.0 < self.summary_fraction <= 1.0 or self.summary_length < 1:
            raise ValueError(
                f"summary_fraction must lie in (0, 1] and select at least one of the {self.segment_length} tokens "
                f"of a segment, got {self.summary_fraction!r}"
            )
        for name in ("recall_dim", "bptt_depth"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1 or None, got {value!r}")
        if self.cuda_graphs is not None and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"cuda_graphs must be true, false or None, got {self.cuda_graphs!r}")
        for name in ("rematerialize", "offload_states", "compile_layers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

        if self.mode == "hmt":
            self._check_recall()
        if self.compile_layers and self.fused_rotary:
            raise ValueError("compile_layers must be false with fused_rotary=True, got true: compiled layers rotate")

    def _check_recall(self) -> None:
        """What memory_recall can take, said before a text is read."""
        if self.queue_size > MAX_RECALL_SLOTS:
            raise ValueError(f"queue_size must be at most {MAX_RECALL_SLOTS}, got {self.queue_size}")
        width = self.hidden_size
        if width % 8 or width > MAX_RECALL_DIM:
            raise ValueError(
                f"text_config must have embeddings of a width that is a multiple of 8, at most {MAX_RECALL_DIM}, for "
                f"recall, got {width}: mode 'rmt' and 'baseline' take others"
            )

    @property
    def summary_length(self) -> int:
        """Tokens that a full segment's summary reads."""
        return round(self.segment_length * self.summary_fraction)

    @property
    def summarises_previous(self) -> bool:
        """Whether a segment's summary is of the segment before it."""
        return self.mode == "hmt" and self.summary_source == "previous"

    @property
    def num_memory(self) -> int:
        """Memory slots in front of a segment: 1, or 0 for the baseline."""
        return 0 if self.mode == "baseline" else 1

    @property
    def vocab_size(self) -> int:
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """Width d of the token embeddings, as generic tools read it off a config."""
        return embedding_width(self.text_config)
