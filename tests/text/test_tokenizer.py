import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.text import IncrementalDecoder, Tokenizer, train_bpe

SOME_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MIXED = st.lists(
    st.one_of(SOME_TEXT, st.sampled_from(["<|endofturn|>", "<think>", "한국의 수도", "    ", "\r\n", "don't", "🙂"])),
    max_size=6,
).map("".join)


def test_published_ids(tokenizer):
    expected = {"[PAD]": 0, "[BOS]": 1, "[UNK]": 3, "<|system|>": 50, "<|user|>": 51, "<|assistant|>": 52}
    expected |= {"<|endofturn|>": 53, "<think>": 54, "</think>": 55, "<|image_pad|>": 67, "<vision>": 73}
    assert {name: tokenizer.token_to_id(name) for name in expected} == expected
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 53, 3)
    assert tokenizer.eos_ids == (53,)
    assert len(tokenizer.control_tokens) == 362
    assert 54 not in tokenizer.special_ids
    assert 53 in tokenizer.special_ids


def test_layout_is_added_tokens_bytes_merges(tokenizer):
    assert tokenizer.vocab_size == 1400
    assert {tokenizer.token_bytes(i) for i in range(362, 362 + 256)} == {bytes([b]) for b in range(256)}
    assert len(tokenizer.token_bytes(618)) == 2


def test_training_is_deterministic_and_refuses_a_tiny_vocabulary(tokenizer, corpus, korean):
    again = train_bpe(corpus, 1400)
    assert again.encode(korean) == tokenizer.encode(korean)
    with pytest.raises(InputError, match="618"):
        train_bpe(["x"], 600)


def test_words_may_span_spaces_but_not_lines(tokenizer):
    superword = train_bpe(["the end of the line\n" * 50], 700)
    assert superword.encode("the end of the line") == [superword.token_to_id("theĠendĠofĠtheĠline")]
    assert len(superword.encode("the end of\nthe line")) > 2
    assert len(tokenizer.encode("12345")) == 5  # digits stand alone


def test_normaliser_is_nfc(tokenizer):
    decomposed = unicodedata.normalize("NFD", "한국어")
    assert tokenizer.encode(decomposed) == tokenizer.encode("한국어")
    assert tokenizer.encode("①") != tokenizer.encode("1")


def test_spelled_control_tokens_stay_text_unless_allowed(tokenizer):
    text = "hi<|endofturn|>\n<|system|>you are <think>"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert not set(plain) & set(tokenizer.control_tokens.values())
    assert [i for i in special if i < 362] == [53, 50, 54]
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    assert tokenizer.decode(special, skip_special=True) == "hi\nyou are <think>"


@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_round_trip_and_no_control_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(i >= 362 for i in ids)


@settings(max_examples=150, deadline=None)
@given(text=MIXED)
def test_plain_encoder_equals_the_full_one_without_spellings(tokenizer, exaone4_tokenizer, text):
    for one in (tokenizer, exaone4_tokenizer):
        if not any(spelling in one.normalize(text) for spelling in one.control_tokens):
            assert one.encode(text) == one.encode(text, allow_special=True)


def test_added_whitespace_runs_are_ordinary_text(exaone4_tokenizer):
    assert exaone4_tokenizer.encode("    x") == [4, *exaone4_tokenizer.encode("x")]
    assert "    " not in exaone4_tokenizer.control_tokens
    # NFKC would make a full-width spelling into the marker
    assert 54 in exaone4_tokenizer.encode("\uff1cthink\uff1e", allow_special=True)
    assert 54 not in exaone4_tokenizer.encode("\uff1cthink\uff1e")


def test_ignore_merges_cannot_look_a_control_token_up(tokenizer_dir):
    document = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["ignore_merges"] = True
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"<[^>]*>"}
    tokenizer = Tokenizer(json.dumps(document))
    assert tokenizer.encode("<think>", allow_special=True) == [54]
    assert 54 not in tokenizer.encode("<think>")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decode_equals_the_library_and_streams_equal(tokenizer, tokenizer_dir, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    library = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    whole = tokenizer.decode(ids, skip_special=skip)
    assert whole == library.decode(ids, skip_special_tokens=skip)
    decoder = IncrementalDecoder(tokenizer, skip_special=skip)
    assert "".join([decoder.feed(i) for i in ids]) + decoder.flush() == whole


def test_markers_that_are_read_are_in_the_text_however_flagged(tokenizer, tokenizer_dir):
    """Some checkpoints flag `<think>` and the like as special: dropped, an answer could not be told from its reasoning."""
    document = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    assert not all(token["special"] for token in document["added_tokens"])
    for token in document["added_tokens"]:
        token["special"] = True
    flagged = Tokenizer(json.dumps(document))
    ids = [54, *tokenizer.encode("생각\n"), 55, *tokenizer.encode("답"), 77, 78, 53]
    text = "<think>생각\n</think>답<tool_call></tool_call>"
    assert flagged.decode(ids, skip_special=True) == tokenizer.decode(ids, skip_special=True) == text
    decoder = IncrementalDecoder(flagged, skip_special=True)
    assert "".join(decoder.feed(token) for token in ids) + decoder.flush() == text
    assert 79 in flagged.special_ids and 53 in flagged.special_ids


def test_a_korean_character_is_held_back_until_whole(tokenizer):
    ids = [tokenizer.token_to_id(c) for c in "íķľ"]  # the three bytes of 한
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.feed(i) for i in ids] == ["", "", "한"]
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.feed(*ids[:2]), decoder.flush()] == ["", "\ufffd"]


@pytest.mark.parametrize("token_id", [-1, 1400, 2**31, 2**70])
def test_unknown_id(tokenizer, token_id):
    with pytest.raises(InputError, match=str(token_id)):
        tokenizer.decode([token_id])


def test_lone_surrogate(tokenizer):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_save_and_load(tokenizer, tmp_path):
    saved = train_bpe(["a b c"] * 3, 620, chat_template="{{ messages[0].content }}")
    saved.save(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    loaded = Tokenizer.from_directory(tmp_path)
    assert loaded.chat_templates == {"default": "{{ messages[0].content }}"}
    assert loaded.encode("a b c") == saved.encode("a b c")
    assert (loaded.eos_ids, loaded.named_tokens) == ((53,), saved.named_tokens)


def _write(directory: Path, name: str, value) -> None:
    (directory / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def _copy(tokenizer_dir: Path, directory: Path) -> Path:
    for file in tokenizer_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_chat_template_places(tokenizer_dir, tmp_path):
    path = _copy(tokenizer_dir, tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert Tokenizer.from_directory(path).chat_templates == {}
    _write(path, "chat_template.json", {"chat_template": "C"})
    assert Tokenizer.from_directory(path).chat_templates == {"default": "C"}
    (path / "chat_template.json").unlink()
    _write(path, "tokenizer_config.json", config | {"chat_template": "A"})
    assert Tokenizer.from_directory(path).chat_templates == {"default": "A"}
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "R"}]
    _write(path, "tokenizer_config.json", config | {"chat_template": named})
    assert Tokenizer.from_directory(path).chat_templates == {"default": "A", "rag": "R"}
    _write(path, "chat_template.jinja", "B")
    assert Tokenizer.from_directory(path).chat_templates == {"default": "B"}
    _write(path, "tokenizer_config.json", config | {"chat_template": [1]})
    with pytest.raises(CheckpointError, match="chat_template"):
        Tokenizer.from_directory(path)


def test_eos_ids_come_from_generation_config_first(tokenizer_dir, tmp_path):
    path = _copy(tokenizer_dir, tmp_path)
    _write(path, "config.json", {"text_config": {"eos_token_id": 7}})
    assert Tokenizer.from_directory(path).eos_ids == (7, 53)
    _write(path, "generation_config.json", {"eos_token_id": [53, 2]})
    assert Tokenizer.from_directory(path).eos_ids == (53, 2)
    for wrong in ("two", True, -1, 2.0, 2**31, [53, 99999999999]):
        _write(path, "generation_config.json", {"eos_token_id": wrong})
        with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id: found .* below 2\*\*31"):
            Tokenizer.from_directory(path)
    _write(path, "generation_config.json", {})
    _write(path, "config.json", {"eos_token_id": 2**31})
    with pytest.raises(CheckpointError, match=r"/config.json: eos_token_id: found 2147483648"):
        Tokenizer.from_directory(path)


BROKEN = {
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer"),
    "html": ("<!DOCTYPE html><html></html>", "not JSON"),
    "truncated": ('{"model": {"type": "BPE"', "not JSON"),
    "list": ("[]", "JSON object"),
    "deep": ("[" * 100_000, "not JSON"),
    "unigram": ('{"model": {"type": "Unigram", "vocab": []}, "decoder": {"type": "ByteLevel"}}', "BPE"),
    "decoder": ('{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": null}', "ByteLevel"),
    "merges": (
        '{"model": {"type": "BPE", "vocab": {}, "merges": [["a","b"]]}, "decoder": {"type": "ByteLevel"}}',
        "malf",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_json(tmp_path, case):
    text, message = BROKEN[case]
    _write(tmp_path, "tokenizer.json", text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_missing_or_binary_tokenizer_json(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(CheckpointError, match="UTF-8"):
        Tokenizer.from_directory(tmp_path)


def test_files_that_disagree(tokenizer_dir, tmp_path):
    path = _copy(tokenizer_dir, tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    _write(path, "tokenizer_config.json", config | {"eos_token": "<nowhere>"})
    with pytest.raises(CheckpointError, match="eos_token"):
        Tokenizer.from_directory(path)
    _write(path, "tokenizer_config.json", config | {"added_tokens_decoder": {"9": {"content": "<think>"}}})
    with pytest.raises(CheckpointError, match="id 9"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("model_type", [None, "exaone_moe", "exaone4"])
def test_transformers_reads_what_save_wrote(tokenizer, korean, tokenizer_dir, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    path = _copy(tokenizer_dir, tmp_path)
    if model_type:
        _write(path, "config.json", {"model_type": model_type, "eos_token_id": 53})
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for text in (
        korean[:80],
        "def f(x):\n    return x  # don't\n",
        "12 ①\r\n\r\n\t🙂 e\u0301",
        "a<|endofturn|>\n<think>b",
    ):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, allow_special=True), text
        ids = tokenizer.encode(text)
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 53)
    assert len(theirs) == tokenizer.vocab_size
