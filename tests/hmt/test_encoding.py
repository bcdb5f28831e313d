"""A text encoded in pieces has the tokens of the whole text, whatever the tokenizer does with what surrounds a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hmt import encoding
from hmt.encoding import encode_file, encode_pieces, encode_text

NOVEL = (Path(__file__).parents[2] / "examples" / "data" / "persuasion.txt").read_text(encoding="utf-8")
TEXTS = {
    "novel": NOVEL[:30_000],
    "no-spaces": "".join(NOVEL[:9_000].split()),
    "one-sign": "=" * 5_000 + NOVEL[:3_000] + "-" * 5_000,
    "white": ("\n" * 700 + " " * 900 + "word\t") * 6,
    "emoji": "".join(chr(0x1F600 + i % 60) + "\u0301 é" for i in range(3_000)),
    "short": "Anne.",
    "empty": "",
}


def trained(model: models.Model, trainer: trainers.Trainer, **parts: object) -> Tokenizer:
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([NOVEL[30_000:90_000], *["=" * 48] * 99], trainer)
    return made


def gpt2() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    return trained(
        models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        post_processor=processors.ByteLevel(trim_offsets=True), decoder=decoders.ByteLevel(),
    )  # fmt: skip


def llama2() -> Tokenizer:
    """A mark for a space, also in front of the text, and no words that merges end at."""
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "<unk>"], show_progress=False)
    made = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True), trainer,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
    )  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(
        models.Unigram(), trainer, normalizer=normalizers.NFKC(), pre_tokenizer=pre_tokenizers.Metaspace()
    )  # fmt: skip


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<s>", "[UNK]"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="[UNK]"), trainer, normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )  # fmt: skip


MAKERS = {"gpt2": gpt2, "llama2": llama2, "unigram": unigram, "wordpiece": wordpiece}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """With a token before each text and one after it."""
    made = MAKERS[request.param]()
    around = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    made.post_processor = processors.Sequence([p for p in (made.post_processor, around) if p])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.mark.parametrize("size", [1_000, 777])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_have_the_tokens_of_the_whole(text: str, size: int, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = TEXTS[text]
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    found = list(encode_pieces(pieces, tokenizer, context=100))
    assert torch.cat(found).tolist() == tokenizer(whole, add_special_tokens=False).input_ids
    if text == "novel":
        assert len(found) > len(whole) / size - 2  # every piece but the last begins with a cut


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("limit", [None, 1, 3_000, 10**9])
def test_a_file_has_the_tokens_of_its_text(
    special: bool, limit: int | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE", 9_000)
    path = tmp_path / "novel.txt"
    path.write_text(TEXTS["novel"], encoding="utf-8")
    expected = tokenizer(TEXTS["novel"], add_special_tokens=special).input_ids[:limit]
    found = encode_file(path, tokenizer, add_special_tokens=special, max_tokens=limit)
    assert found.dtype == torch.long and found.tolist() == [expected]
    if limit is None:
        assert encode_text(TEXTS["novel"], tokenizer, add_special_tokens=special).tolist() == expected


def test_no_more_is_read_than_is_wanted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 9_000)
    path = tmp_path / "novel.txt"
    path.write_bytes(TEXTS["novel"].encode() + b"\xff")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2())
    assert encode_file(path, tokenizer, max_tokens=1_000).shape == (1, 1_000)
    with pytest.raises(ValueError, match="FILE must be UTF-8 text"):
        encode_file(path, tokenizer)


def test_special_tokens_are_found_without_any_latin_letter(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "書": 2, "讀": 3}, []))
    around = [("<s>", 0), ("</s>", 1)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    path = tmp_path / "book.txt"
    path.write_text("讀書", encoding="utf-8")
    assert encode_file(path, PreTrainedTokenizerFast(tokenizer_object=made)).tolist() == [[0, 3, 2, 1]]


def test_a_limit_is_a_number_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens must be an integer >= 1 or None, got 0"):
        encode_file(tmp_path, PreTrainedTokenizerFast(tokenizer_object=gpt2()), max_tokens=0)


def test_a_tokenizer_without_offsets_sees_the_whole_text() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **_: object) -> object:
            return type("Encoding", (), {"input_ids": [len(text)]})

    assert [ids.tolist() for ids in encode_pieces(["ab", "c"], Slow(), context=1)] == [[3]]
