"""Folders of tokenizers as the Hub has them: a small one of each family, with the files and settings of its kind."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import TYPE_CHECKING, Any

import vocab_zoo

from adapterkit.gguf.vocab import pretokenizers, proto

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 512  # rows of an embedding that has room for every one
TOKENS = 400  # of most, so that some rows are padding
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
# Families beside byte-level BPEs, which go by llama.cpp's name of their pre-tokenizer.
SPM, BARE, WHOLE, GEMMA, GEMMA4 = "spm", "spm without json", "spm for every row", "gemma", "gemma 4"
WORDS, UNIGRAM, FAIRSEQ, ROBERTA, MODERN, NONE = "words", "unigram", "fairseq", "roberta", "modern bert", "none"


def tokenizer(folder: Path, family: str, more: tuple[str, ...]) -> dict[str, int]:
    """Write the files of a tokenizer; gives ids by role."""
    if family in (SPM, BARE, WHOLE):
        model = _sentencepiece("bpe", SIZE if family == WHOLE else TOKENS)
        (folder / "tokenizer.model").write_bytes(model)
        said: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False}
        if family != BARE:
            added = {"<unk>": True, "<s>": True, "</s>": True, "<|user|>": True, "<tool>": False}
            said["added_tokens_decoder"] = _write(folder, _as_json(model, added, ("<unk>", "<s>", "</s>")))
        return settings(folder, "LlamaTokenizer", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, **said)
    if family in (GEMMA, GEMMA4):
        model = _sentencepiece("gemma", SIZE if family == GEMMA4 else TOKENS)
        names = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
        turns = ["<start_of_turn>", "<end_of_turn>", "<|channel>"]
        added = dict.fromkeys((*names.values(), *turns), True)
        found = _write(folder, _as_json(model, added, ("<unk>", "<bos>", "<eos>")))
        if family == GEMMA:
            (folder / "tokenizer.model").write_bytes(model)
        said = {"add_bos_token": True, "add_eos_token": False, "additional_special_tokens": turns}
        return settings(folder, "GemmaTokenizer", names, added_tokens_decoder=found, **said)
    if family in (UNIGRAM, FAIRSEQ):
        return _unigram(folder, family == FAIRSEQ)
    if family == WORDS:
        names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
        found = _write(folder, _words())
        return settings(folder, "BertTokenizer", names, do_lower_case=True, added_tokens_decoder=found)
    if family in (ROBERTA, MODERN):
        return _framed(folder, family == ROBERTA)
    if family == NONE:
        return {"bos": 0, "eos": 1, "pad": 1}
    data = json.loads(_byte_level(family, more))
    data["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    names = {"bos": "<|start|>", "eos": "<|end|>", "pad": "<|end|>"}
    if more:
        del names["bos"]
    return settings(folder, "PreTrainedTokenizerFast", names, added_tokens_decoder=_write(folder, data))


def _write(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    return {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in data["added_tokens"]}


def settings(folder: Path, kind: str, names: dict[str, str], **said: Any) -> dict[str, int]:
    found = {"tokenizer_class": kind, "chat_template": CHAT, **said} | {f"{k}_token": v for k, v in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(found, indent=2, ensure_ascii=False))
    if "added_tokens_decoder" not in said:
        return {"bos": 1, "eos": 2}
    ids = {one["content"]: int(number) for number, one in said["added_tokens_decoder"].items()}
    return {role: ids[name] for role, name in names.items()}


def _added(ids: dict[str, int], names: dict[str, bool], *, lstrip: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    flags = {"single_word": False, "rstrip": False, "normalized": False}
    return [
        {"id": ids[name], "content": name, "lstrip": name in lstrip, **flags, "special": special}
        for name, special in sorted(names.items(), key=lambda pair: ids[pair[0]])
    ]


@cache
def _byte_level(pre: str, more: tuple[str, ...]) -> str:
    row = next(row for row in pretokenizers.ROWS if row.name == pre)
    made = vocab_zoo.byte_level(pretokenizers.as_json(row), ignore_merges=row.ignore_merges, size=TOKENS - len(more))
    made.add_special_tokens(list(more))
    return str(made.to_str())


def _framed(folder: Path, roberta: bool) -> dict[str, int]:
    """A byte-level BPE with tokens around each text."""
    data = json.loads(_byte_level("roberta-bpe" if roberta else "modern-bert", ()))
    vocab = data["model"]["vocab"]
    kept = [token for token in sorted(vocab, key=vocab.get) if token not in vocab_zoo.SPECIALS]
    if roberta:
        first = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        names = {**first, "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    else:
        first = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"}
        names = {**first, "mask": "[MASK]"}
    ids = {token: number for number, token in enumerate((*first.values(), *kept, names["mask"]))}
    data["model"]["vocab"] = ids
    data["added_tokens"] = _added(ids, dict.fromkeys((*first.values(), names["mask"]), True), lstrip=(names["mask"],))
    pair = [names["sep"], ids[names["sep"]]], [names["cls"], ids[names["cls"]]]
    if roberta:
        data["post_processor"] = {
            "type": "RobertaProcessing", "sep": pair[0], "cls": pair[1], "trim_offsets": True, "add_prefix_space": False
        }  # fmt: skip
    else:
        data["post_processor"] = _template(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [tuple(pair[1]), tuple(pair[0])]
        )
    kind = "RobertaTokenizer" if roberta else "PreTrainedTokenizerFast"
    return settings(folder, kind, names, added_tokens_decoder=_write(folder, data))


def _template(single: str, pair: str, special: list[tuple[str, int]]) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, processors

    made = Tokenizer(models.BPE())
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    found: dict[str, Any] = json.loads(made.to_str())["post_processor"]
    return found


@cache
def _words() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, limit_alphabet=100, special_tokens=names, show_progress=False)
    made.train_from_iterator(vocab_zoo.corpus(), trainer)
    data = json.loads(made.to_str())
    data["post_processor"] = _template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])
    return data


@cache
def _sentencepiece(kind: str, size: int) -> bytes:
    import sentencepiece

    own: dict[str, Any] = {"vocab_size": size}
    if kind in ("bpe", "gemma"):
        own |= {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        own |= {"split_digits": True, "allow_whitespace_only_pieces": True}
        symbols = ["<|user|>", "<tool>"] if kind == "bpe" else ["<start_of_turn>", "<end_of_turn>", "<|channel>"]
        own |= {"user_defined_symbols": symbols}
    if kind == "gemma":
        own |= {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
        own |= {"eos_piece": "<eos>", "bos_piece": "<bos>"}
    elif kind == "unigram":
        own |= {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in vocab_zoo.corpus() if text.strip() and text.isascii()),
        model_writer=written,
        model_type="bpe" if kind in ("bpe", "gemma") else "unigram",
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **own,
    )
    return written.getvalue()


def _as_json(model: bytes, added: dict[str, bool], names: tuple[str, str, str]) -> dict[str, Any]:
    """A SentencePiece BPE as transformers converts it."""
    data: dict[str, Any] = json.loads(vocab_zoo.spm_json(model, names).files["tokenizer.json"])
    data["added_tokens"] = _added(data["model"]["vocab"], added)
    if not proto.parse(model, "model").prefix:
        data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return data


def _unigram(folder: Path, fairseq: bool) -> dict[str, int]:
    """T5's or XLM-RoBERTa's tokenizer: a SentencePiece model, and the same as transformers converts it."""
    trained = _sentencepiece("fairseq" if fairseq else "unigram", TOKENS)
    (folder / ("sentencepiece.bpe.model" if fairseq else "spiece.model")).write_bytes(trained)
    model = proto.parse(trained, "model")
    pairs: list[tuple[str, float]] = [(piece.text, piece.score) for piece in model.pieces]
    if fairseq:
        pairs = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")] + pairs[3:] + [("<mask>", 0.0)]
        names = {
            "bos": "<s>",
            "eos": "</s>",
            "unk": "<unk>",
            "pad": "<pad>",
            "cls": "<s>",
            "sep": "</s>",
            "mask": "<mask>",
        }
    else:
        names = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    ids = {token: number for number, (token, _) in enumerate(pairs)}
    data = json.loads(vocab_zoo.unigram().files["tokenizer.json"])
    data["model"] |= {"vocab": pairs, "unk_id": ids["<unk>"]}
    data["added_tokens"] = _added(ids, dict.fromkeys(names.values(), True), lstrip=("<mask>",))
    if fairseq:
        special = [("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
        data["post_processor"] = _template("<s> $A </s>", "<s> $A </s> </s> $B </s>", special)
    else:
        data["post_processor"] = _template("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    kind = "XLMRobertaTokenizer" if fairseq else "T5Tokenizer"
    return settings(folder, kind, names, added_tokens_decoder=_write(folder, data))
