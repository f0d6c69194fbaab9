"""The tokenizer and the UMT5 encoder, with the text processing of ``WanPipeline``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from settings import MAX_TOKENS, TEXT_CONFIG
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
WORD_SCORE, CHARACTER_SCORE = -5.0, -20.0


def build_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """Return a T5 tokenizer whose pieces are the captions' words, and all ASCII characters.

    The scores make a known word one piece; any other word falls apart into characters.
    """
    words = sorted({word for caption in captions for word in re.findall(r"[\w']+", caption)})
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [("\u2581", CHARACTER_SCORE)]
    vocabulary += [("\u2581" + word, WORD_SCORE) for word in words]
    vocabulary += [(character, CHARACTER_SCORE) for character in characters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Return a freshly initialised encoder."""
    return UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **TEXT_CONFIG))


def tokenize(tokenizer: T5TokenizerFast, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (captions, MAX_TOKENS), as the pipeline makes them."""
    batch = tokenizer(
        list(captions),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return batch.input_ids, batch.attention_mask


def encode_text(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return (B, MAX_TOKENS, d_model) with zeros after each sentence, as the pipeline does."""
    hidden = encoder(ids, mask).last_hidden_state
    return hidden * mask.unsqueeze(-1).to(hidden.dtype)
