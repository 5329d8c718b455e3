from __future__ import annotations

import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame.config.locations import find_model_conflicts, find_start
from flame.data.encoding import encode_document
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.refusals import expect_one_line
from tests.support.tokenizers import make_bpe

BYTES = load_tokenizer("bytes")
EOS = 256
texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200, deadline=None)
@given(texts)
def test_bytes_tokenizer_is_lossless_and_its_ids_are_the_bytes(text: str) -> None:
    ids = encode_document(BYTES, text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [*text.encode(), EOS]
    assert BYTES.decode(ids[:-1]) == text


def test_bytes_tokenizer_keeps_what_other_tokenizers_tidy_up() -> None:
    text = " a  b .\t\r\n\x00 don 't , é e\u0301 \u2028<|endoftext|><|pad|> "
    assert BYTES.decode(encode_document(BYTES, text)[:-1]) == text
    long = "def f( x ):\n    return é\n" * 5000
    assert BYTES.decode(encode_document(BYTES, long)[:-1]) == long


def test_bytes_tokenizer_vocabulary() -> None:
    assert len(BYTES) == 258
    assert (BYTES.eos_token_id, BYTES.pad_token_id, BYTES.bos_token_id) == (EOS, 257, None)
    assert BYTES.decode([104, 105, EOS]) == "hi<|endoftext|>"


def test_special_tokens_inside_text_do_not_end_the_document() -> None:
    ids = encode_document(BYTES, "a<|endoftext|>b<|endoftext|>").tolist()
    assert ids.count(EOS) == 1 and ids[-1] == EOS
    assert BYTES("a<|endoftext|>")["input_ids"] == [97, EOS], "encoding a document must not change the tokenizer for others"


def test_bytes_tokenizer_round_trips_through_a_folder(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    text = " naïve\n\n  <|pad|> text"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert encode_document(loaded, text).tolist() == encode_document(BYTES, text).tolist()
        assert loaded.decode(encode_document(loaded, text)[:-1]) == text
        assert (len(loaded), loaded.eos_token, loaded.pad_token) == (258, "<|endoftext|>", "<|pad|>")


def make_word_tokenizer(*, template: str = "$A", eos: str | None = "</s>", max_length: int = 8) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, model_max_length=max_length)


@pytest.mark.parametrize(
    ("template", "expected"), [("$A", [2, 3, 1]), ("<s> $A", [0, 2, 3, 1]), ("<s> $A </s>", [0, 2, 3, 1]), ("$A </s>", [2, 3, 1])]
)
def test_documents_have_the_tokenizers_own_ids_and_one_eos(template: str, expected: list[int]) -> None:
    assert encode_document(make_word_tokenizer(template=template), "a b").tolist() == expected


def test_documents_longer_than_the_models_context_are_whole_and_silent(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_word_tokenizer()
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        assert len(encode_document(tokenizer, "a " * 1000)) == 1001
    assert not caplog.records


def test_tokenizers_without_eos_are_refused(tmp_path: Path) -> None:
    make_word_tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.tokenizer_path = .* has no eos token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{broken"])
def test_folders_without_a_tokenizer_are_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"model\.tokenizer_path = .* cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- files, and folders that lack something


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(path))
    expect_one_line(caught.value, f'model.tokenizer_path = "{path}"', *parts)


@pytest.mark.parametrize("name", ["tokenizer.json", "tok.json"])
@pytest.mark.parametrize("eos", ["</s>", "<|endoftext|>", "<eos>"])
def test_a_bare_tokenizer_file_is_enough(tmp_path: Path, name: str, eos: str) -> None:
    backend = Tokenizer.from_str(make_bpe().backend_tokenizer.to_str().replace('"</s>"', json.dumps(eos)))
    backend.save(str(tmp_path / name))
    loaded = load_tokenizer(str(tmp_path / name))
    assert (loaded.eos_token, loaded.eos_token_id) == (eos, 0)
    assert encode_document(loaded, "ab A é").tolist()[:-1] == backend.encode("ab A é").ids
    start = find_start("", "", tmp_path)
    assert list(find_model_conflicts("", str(tmp_path / name), start)) == list(find_model_conflicts("", "bytes", start))
    loaded.save_pretrained(tmp_path / "exported")
    assert load_tokenizer(str(tmp_path / "exported")).eos_token == eos


def test_the_settings_beside_a_tokenizer_file_are_read(tmp_path: Path) -> None:
    make_bpe(eos="ab").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eos_token == "ab"


def test_a_tokenizer_file_that_does_not_say_what_ends_a_text(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tok.json"))
    refuse(tmp_path / "tok.json", "no end-of-text token of a known name", "tokenizer_config.json")
    backend = Tokenizer(models.WordLevel({"</s>": 0, "<eos>": 1}, unk_token="</s>"))
    backend.save(str(tmp_path / "tok.json"))
    refuse(tmp_path / "tok.json", "several tokens that may end a text (</s>, <eos>)")
    (tmp_path / "tok.json").write_text("{broken")
    refuse(tmp_path / "tok.json", "cannot be loaded as a tokenizer")


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece reads it")
def test_a_folder_with_a_sentencepiece_model_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    refuse(tmp_path, "SentencePiece model (tokenizer.model)", "pip install sentencepiece protobuf", "tokenizer.json")
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_a_token_for_unknown_text(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tok.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tok.json"))
    assert encode_document(tokenizer, "a a").tolist() == [0, 0, 1]
    with pytest.raises(UserError) as caught:
        encode_document(tokenizer, "a b")
    expect_one_line(caught.value, f'model.tokenizer_path = "{tmp_path}/tok.json" cannot encode a text', "unk_token")


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", None])
@pytest.mark.parametrize("model", ["", '{"model_type": "llama"}'])
def test_folders_load_as_transformers_loads_them(tmp_path: Path, kind: str | None, model: str) -> None:
    """Whether or not torch is loaded for it."""
    backend = make_bpe().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<x> $A", special_tokens=[("<x>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<x>").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    others = {key: value for key, value in json.loads(path.read_text()).items() if key != "tokenizer_class"}
    path.write_text(json.dumps(others | ({"tokenizer_class": kind} if kind else {})))
    if model:
        (tmp_path / "config.json").write_text(model)
    expected, loaded = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert type(loaded) is type(expected)
    assert loaded.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == expected.special_tokens_map and loaded.get_vocab() == expected.get_vocab()
    assert loaded("ab A")["input_ids"] == expected("ab A")["input_ids"]


def test_a_tokenizer_that_transformers_misreads_is_refused(tmp_path: Path) -> None:
    """AutoTokenizer takes the class of the model beside it, which splits a text otherwise."""
    BYTES.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError) as refusal:
        load_tokenizer(str(tmp_path / "model"))
    expect_one_line(refusal.value, "transformers reads it as Qwen2Tokenizer", "copy tokenizer.json alone")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
    assert encode_document(load_tokenizer(str(tmp_path / "alone")), "e\u0301").tolist() == [*"e\u0301".encode(), EOS]


def test_a_familys_own_tokenizer_is_not_refused(tmp_path: Path) -> None:
    """Whether or not the settings name its class."""
    backend = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1, "b": 2}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}')
    own = load_tokenizer(str(tmp_path))
    own.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("Qwen2Tokenizer", "PreTrainedTokenizerFast"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
        assert load_tokenizer(str(tmp_path)).backend_tokenizer.to_str() == own.backend_tokenizer.to_str()
