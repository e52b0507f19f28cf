"""Text to token ids and back: EXAONE's byte-level BPE over the `tokenizers` library.

Two encoders are built from one tokenizer.json. The full one turns the spelling of a control token into its id. The
plain one does not know the control tokens, so that what a user writes stays text. Every added token that is not a run
of whitespace counts as a control token; added whitespace runs (EXAONE 3.x and 4.0) are ordinary text to both.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from exaone_jax.errors import CheckpointError, InputError, TooLongError
from exaone_jax.text.generation import READ_MARKERS

# K-EXAONE's pre-tokenizer: a "word" may span single spaces, so that superword tokens can form.
K_EXAONE_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

# K-EXAONE has 362 added tokens before its 256 bytes. Ids that are published carry their names, the others fillers;
# the tool tokens exist but their ids are not published, so 75.. is this package's choice.
NUM_ADDED_TOKENS = 362
_SLICE = 1 << 16  # characters that are encoded at once to see how long a text is
_SPECIAL = {0: "[PAD]", 1: "[BOS]", 2: "[EOS]", 3: "[UNK]", 50: "<|system|>", 51: "<|user|>", 52: "<|assistant|>"}
_SPECIAL |= {53: "<|endofturn|>", 66: "<|vision_pad|>", 67: "<|image_pad|>", 68: "<|video_pad|>"}
_SPECIAL |= {73: "<vision>", 74: "</vision>", 75: "<|tool|>", 76: "<|tool_declare|>"}
_MARKERS = {54: "<think>", 55: "</think>"}  # not special: they survive a decode that skips special tokens
_MARKERS |= {77: "<tool_call>", 78: "</tool_call>", 79: "<tool_result>", 80: "</tool_result>"}
_NAMED_TOKENS = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "<|endofturn|>", "unk_token": "[UNK]"}


class Tokenizer:
    """A checkpoint's tokenizer. Build it with `from_directory` or `train_bpe`; it does not change afterwards.

    Attributes:
      chat_templates: name -> source of the checkpoint's own chat templates; "default" is the usual one.
      control_tokens: spelling -> id of the added tokens that user text may not produce.
      eos_ids: the ids that end a generation, from generation_config.json, config.json and tokenizer_config.json.
      named_tokens: "bos_token", "eos_token", … -> spelling, as chat templates see them.
    """

    def __init__(
        self,
        raw: str,
        *,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        source: str = "tokenizer.json",
    ) -> None:
        """Args: raw, the text of a tokenizer.json; config, the parsed tokenizer_config.json. Raises CheckpointError."""
        document = _parse_document(raw, source)
        self._raw = raw
        self._full = _build(document, source)
        added = document.get("added_tokens") or ()
        self.control_tokens: dict[str, int] = {
            token["content"]: token["id"] for token in added if token["content"].strip() and len(token["content"]) > 1
        }
        self._special_ids = frozenset(
            token["id"] for token in added if token.get("special") and token["content"] not in READ_MARKERS
        )
        self._plain = _build(_without_control_tokens(document, self.control_tokens), source)
        self._bytes: dict[int, bytes] = {}
        self.config: dict[str, Any] = dict(config or {})
        self.chat_templates: dict[str, str] = dict(chat_templates or {})
        self.named_tokens = _named_tokens(self.config)
        self._check_named_tokens(source)
        self.eos_ids = self._merge_eos_ids(eos_ids)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a Hugging Face checkpoint directory's tokenizer files. Nothing in them is executed.

        Raises:
          CheckpointError: tokenizer.json is missing, not a byte-level BPE or malformed, or the files disagree.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: not found; a tokenizer.json is needed (slow tokenizer files are not read)")
        config = _read_object(directory / "tokenizer_config.json")
        named = _read_object(directory / "special_tokens_map.json")
        return cls(
            _read_text(file),
            config={**{key: value for key, value in named.items() if key not in config}, **config},
            chat_templates=_read_chat_templates(directory, config),
            eos_ids=_read_eos_ids(directory),
            source=str(file),
        )

    @cached_property
    def vocab_size(self) -> int:
        """Number of rows an embedding needs for this tokenizer: its highest id plus one."""
        return max(self._full.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json and of the ids that end a generation: equal ones give equal ids."""
        return hashlib.sha256(f"{self._raw}\n{self.eos_id} {sorted(self.eos_ids)}".encode()).hexdigest()

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the added tokens that tokenizer.json flags special; `skip_special` drops these.

        Not the markers of reasoning and tool calls, however flagged: who reads them must find them in the text.
        """
        return self._special_ids

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def unk_id(self) -> int | None:
        return self._named_id("unk_token")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as tokenizer.json spells it (bytes in the byte-level alphabet), or None."""
        return self._full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as tokenizer.json spells it, or None."""
        return self._full.id_to_token(token_id)

    def encode(self, text: str, *, add_special: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          add_special: also add what the checkpoint's post-processor adds (EXAONE's add nothing).
          allow_special: let a control token's spelling become its id. Only for text that the caller wrote, such as a
            rendered prompt; by default such a spelling stays text.

        Raises:
          InputError: the text cannot be UTF-8 (it has a lone surrogate).
        """
        check_encodable(text, "text")
        encoder = self._full if allow_special else self._plain
        # A batch of one: only batches let other threads run meanwhile.
        return encoder.encode_batch_fast([text], add_special_tokens=add_special)[0].ids

    def check_length(self, text: str, most: int) -> None:
        """Raise TooLongError for a text of far more than `most` tokens, before all are made: a token takes hundreds of bytes.

        The text is cut into slices, at whose ends tokens may be cut too, so it is refused from twice as many tokens on.
        """
        check_encodable(text, "text")
        found = 0
        for start in range(0, len(text), _SLICE) if len(text) > _SLICE else ():
            piece = text[start : start + _SLICE]
            found += len(self._full.encode_batch_fast([piece], add_special_tokens=False)[0])
            if found > 2 * most:
                raise TooLongError(f"the prompt has more than {2 * most} tokens; expected at most {most}")

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of a text in which control tokens become ids, except those that `mark` interrupts.

        `mark` is removed before encoding. The text is cut at its uninterrupted control tokens, as the tokenizer itself
        cuts it before any merge, and the pieces between are encoded by the plain encoder: where the text between has no
        control spelling, the ids equal those of encoding the unmarked text whole.
        """
        check_encodable(text, "text")
        control_ids = frozenset(self.control_tokens.values())
        encoding = self._full.encode_batch([text], add_special_tokens=False)[0]
        ids: list[int] = []
        position = 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in control_ids:
                ids += self.encode(text[position:start].replace(mark, ""))
                ids.append(token_id)
                position = end
        return ids + self.encode(text[position:].replace(mark, ""))

    def normalize(self, text: str) -> str:
        """The text after the checkpoint's Unicode normaliser."""
        normalizer = self._full.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. Raises InputError for an unknown id."""
        kept = (token_id for token_id in ids if not (skip_special and token_id in self._special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; possibly only a part of a character.

        Raises:
          InputError: no token has this id.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._full.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            raise InputError(f"token id {token_id}: not in the vocabulary of {self.vocab_size} tokens")
        values = [_BYTE_OF_CHAR.get(character) for character in token]
        # As the byte-level decoder: a token with any character outside the byte alphabet (an added one) is itself.
        return token.encode() if None in values else bytes(value for value in values if value is not None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates to a directory.

        transformers' AutoTokenizer reads the result. Each file is written whole under a partial name, then renamed.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        _write_text(directory / "tokenizer_config.json", _dump(config))
        _write_text(directory / "special_tokens_map.json", _dump(self.named_tokens))
        for name, template in self.chat_templates.items():
            default = name == "default"
            file = directory / ("chat_template.jinja" if default else f"additional_chat_templates/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            _write_text(file, template)
        _write_text(directory / "tokenizer.json", self._raw)

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self._full.token_to_id(token)

    def _check_named_tokens(self, source: str) -> None:
        for name, token in self.named_tokens.items():
            if self._full.token_to_id(token) is None:
                raise CheckpointError(f"tokenizer_config.json: {name} {token!r} is not in the vocabulary of {source}")
        for key, entry in (self.config.get("added_tokens_decoder") or {}).items():
            content = entry.get("content") if isinstance(entry, Mapping) else None
            found = self._full.token_to_id(content) if isinstance(content, str) else None
            if str(found) != str(key):
                raise CheckpointError(
                    f"tokenizer_config.json: added_tokens_decoder says id {key} is {content!r}, {source} has id {found}"
                )

    def _merge_eos_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        own = [] if self.eos_id is None else [self.eos_id]
        return tuple(dict.fromkeys([*eos_ids, *own]))


class IncrementalDecoder:
    """Decodes a stream of token ids; the pieces joined equal `Tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, *ids: int) -> str:
        """The text that these further ids complete; may be empty. Raises InputError for an unknown id."""
        kept = (token_id for token_id in ids if token_id not in self._skipped)
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, kept)))

    def flush(self) -> str:
        """End the stream: a character left incomplete becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, chat_template: str | None = None, min_frequency: int = 2
) -> Tokenizer:
    """Train a byte-level BPE laid out as K-EXAONE's: 362 added tokens, 256 bytes, then merges.

    NFC normaliser, K-EXAONE's pre-tokenizer, its published special ids (pad 0, bos 1, unk 3, roles 50 to 52,
    `<|endofturn|>` 53 as eos, `<think>` 54, `</think>` 55). The result may have fewer tokens than `vocab_size` where
    the texts have no more pairs that occur `min_frequency` times.

    Raises:
      InputError: vocab_size has no room for the added tokens and bytes.
    """
    smallest = NUM_ADDED_TOKENS + 256
    if vocab_size < smallest:
        raise InputError(f"vocab_size {vocab_size}: at least {smallest} are needed for added tokens and bytes")
    names = [_SPECIAL.get(i) or _MARKERS.get(i) or f"[unused{i}]" for i in range(NUM_ADDED_TOKENS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = _untrained()
    tokenizer.train_from_iterator(texts, trainer)
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["id"] not in _MARKERS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in document["added_tokens"]},
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        **_NAMED_TOKENS,
    }
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(_dump(document), config=config, chat_templates=templates, source="trained tokenizer")


def check_encodable(text: str, name: str) -> None:
    """Raise InputError if a text cannot be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: not valid Unicode, lone surrogate at character {error.start}") from error


def _untrained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(K_EXAONE_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> Iterator[tuple[str, int]]:
    """GPT-2's byte alphabet: printable bytes are themselves, the other 68 are shifted to U+0100 and up."""
    shifted = 256
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield chr(byte), byte
        else:
            yield chr(shifted), byte
            shifted += 1


_BYTE_OF_CHAR = dict(_byte_alphabet())


def _parse_document(raw: str, source: str) -> dict[str, Any]:
    """The parsed tokenizer.json, checked to be a byte-level BPE."""
    document = _parse_object(raw, source)
    model, decoder = document.get("model"), document.get("decoder")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{source}: expected a BPE model with a vocabulary, as every EXAONE tokenizer is")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        found = decoder.get("type") if isinstance(decoder, dict) else decoder
        raise CheckpointError(f"{source}: decoder is {found!r}; expected ByteLevel")
    for token in document.get("added_tokens") or ():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(f"{source}: added token {token!r} has no content")
    return document


def _build(document: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise CheckpointError(f"{source}: malformed: {error}") from error
    for token in document.get("added_tokens") or ():
        found = tokenizer.token_to_id(token["content"])
        if found != token.get("id"):
            raise CheckpointError(
                f"{source}: added token {token['content']!r} has id {found}, expected {token.get('id')}"
            )
    # A checkpoint's training-time truncation or padding must not touch a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_control_tokens(document: Mapping[str, Any], control_tokens: Mapping[str, int]) -> dict[str, Any]:
    """The document with no control tokens, every other id unchanged."""
    kept = [token for token in document.get("added_tokens") or () if token["content"] not in control_tokens]
    model = dict(document["model"])
    vocab = dict(model["vocab"])
    # Spelled with a space, which the byte alphabet lacks, a name can never be produced (ignore_merges looks words up).
    renamed = {name: f"control token {token_id}" for name, token_id in control_tokens.items()}
    vocab = {renamed.get(name, name): token_id for name, token_id in vocab.items()}
    # Added tokens outside the vocabulary get ids in order of appearance, so the kept ones are pinned.
    model["vocab"] = vocab | {token["content"]: token["id"] for token in kept}
    if model.get("unk_token") in control_tokens:
        model["unk_token"] = renamed[model["unk_token"]] if renamed[model["unk_token"]] in vocab else None
    return {**document, "model": model, "added_tokens": kept}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like from tokenizer_config.json, where each is a string or {"content": string}."""
    named: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if content is None:
            continue
        if not isinstance(content, str):
            raise CheckpointError(f"tokenizer_config.json: {name} is {value!r}; expected a string")
        named[name] = content
    return named


def _read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """name -> source. A file chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    templates = _config_templates(config.get("chat_template"))
    processor = _read_object(directory / "chat_template.json").get("chat_template")  # older multimodal checkpoints
    if isinstance(processor, str):
        templates["default"] = processor
    if (directory / "chat_template.jinja").is_file():
        templates = {"default": _read_text(directory / "chat_template.jinja")}
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = _read_text(file)
    return templates


def _config_templates(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    templates: dict[str, str] = {}
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(
                "tokenizer_config.json: chat_template must be a string or a list of {name, template}; "
                f"found {type(value).__name__}"
            )
        templates[name] = template
    return templates


def _read_eos_ids(directory: Path) -> list[int]:
    """What generation_config.json says, else config.json, else its text_config. An id need not be in the vocabulary."""
    generation, config = _read_object(directory / "generation_config.json"), _read_object(directory / "config.json")
    text = config.get("text_config")
    sources = (("generation_config.json", generation), ("config.json", config), ("config.json", text))
    for file, source in sources:
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ids):
            raise CheckpointError(
                f"{directory / file}: eos_token_id: found {ascii(value)[:200]}, expected a token id or a list of token "
                "ids, each at least 0 and below 2**31"
            )
        return ids
    return []


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file."""
    return _parse_object(_read_text(file), str(file)) if file.is_file() else {}


def _parse_object(text: str, source: str) -> dict[str, Any]:
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{source}: is a Git LFS pointer, not the file; fetch it with git lfs pull")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text: {error}") from error


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
