"""A stream's pieces are together the text of the plain answer, and it ends as OpenAI's do."""

from __future__ import annotations

import random

import pytest
from served import anew, ask, plain, question, said
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafx.integrations.server.texts import Decoder

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
#: Letters, and bytes that begin characters of two and three bytes, or go on with them. Each is a
#: token, from 7 on.
BYTES = [*b"abcdefgh", *range(0xC3, 0xD8), *range(0xE1, 0xE9), *range(0xAE, 0xC0)]


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", *(f"<{i}>" for i in range(3, 7))]
    signs = map(chr, BYTES)  # ByteLevel has these bytes stand for themselves
    vocabulary = {name: i for i, name in enumerate([*special, *signs][:size])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.fixture(scope="module")
def speaker(files, server):
    """The same model, whose tokens are parts of characters."""
    tokenizer = byte_tokenizer(files.case.base.config.vocab_size)
    return anew(server, files, tokenizer)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_a_stream_is_the_plain_answer(speaker, path):
    draw = random.Random(0)
    asked = [
        ("".join(draw.choices("abcdefgh", k=draw.randrange(2, 9))), draw.randrange(1, 12))
        for _ in range(12)
    ]

    def answer(words, new, **others):
        body = question(path, words, new, **others)
        answer = ask(speaker, "POST", path, model="tiny:a1", **body)
        assert answer.status_code == 200, answer.text
        return answer

    found = [
        (plain(path, answer(words, new).json()), answer(words, new, stream=True).text)
        for words, new in asked
    ]
    assert sum(whole.endswith("\ufffd") for whole, _ in found) > 3  # cut off within a character
    for whole, streamed in found:
        assert said(path, streamed) == whole
        ends = streamed.endswith("data: [DONE]\n\n")
        assert ends == (path != RESPONSES)  # whose last event is response.completed


@pytest.mark.quick
def test_bytes_that_are_no_text_do_not_end_a_stream():
    """tokenizers' own stream raises at some."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )

    draw = random.Random(0)
    for _ in range(500):
        # Bytes that begin no character: one that was said cannot be taken back.
        tokens = [draw.choice([257, 258, 259, draw.randrange(129, 193)]) for _ in range(12)]
        decoder = Decoder(tokenizer)
        pieces = [decoder.step(token) for token in tokens]
        assert "".join([*pieces, decoder.end()]) == tokenizer.decode(tokens)
