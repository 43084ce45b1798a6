"""Trains nano's tokenizer: a byte-level BPE of 991 entries and the 33 added tokens of Qwen3.5, 1024 in all.

python examples/nano/tokenizer.py DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from tasks import TASKS, completion, draw_lesson
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BASE_SIZE = 991
# Qwen3.5's split: contractions, words with their combining marks, single digits, symbols, line ends, blanks
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# in Qwen3.5's order; the second entry says "special", that is: skipped when decoding without special tokens
ADDED_TOKENS = (
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")),
    *((f"<|{name}|>", True) for name in ("box_start", "box_end", "quad_start", "quad_end")),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    *((name, False) for name in ("<tool_call>", "</tool_call>")),
    *((f"<|fim_{name}|>", False) for name in ("prefix", "middle", "suffix", "pad")),
    *((f"<|{name}|>", False) for name in ("repo_name", "file_sep")),
    *((name, False) for name in ("<tool_response>", "</tool_response>", "<think>", "</think>")),
    *((name, True) for name in ("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>")),
    *((name, True) for name in ("<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>")),
)


def corpus(lessons: int = 12000, seed: int = 0) -> list[str]:
    """The texts of training lessons; tool definitions a few times only, since they are always the same words."""
    rng = Random(seed)
    texts = []
    for i in range(lessons):
        item, more = draw_lesson(rng.choice(list(TASKS)), rng, more=2)
        for message in item.messages:
            content = message["content"]
            texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
        texts += ["user\n", "assistant\n", "system\n", item.completion, "<0.2 seconds>"]
        texts += [text for turn in more for text in (turn.question, completion(turn, item.enable_thinking))]
        if item.tools and i % 4 == 0:
            texts += [json.dumps(tool) for tool in item.tools]
            texts.append("# Tools\n\n<tools>\n</tools>\n\nA call looks like this:\n\n")
            texts.append("<function=NAME>\n<parameter=KEY>\nVALUE\n")
    return texts


def train_tokenizer() -> Tokenizer:
    """The trained tokenizer with ids 0..990 for the BPE and 991..1023 for the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    added = [token for token, _ in ADDED_TOKENS]
    texts = []
    for text in corpus():
        for token in added:
            text = text.replace(token, "\n")
        texts.append(text)
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == BASE_SIZE, tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in ADDED_TOKENS])
    assert tokenizer.get_vocab_size() == BASE_SIZE + len(ADDED_TOKENS) == 1024
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    train_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 32768,
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]))
