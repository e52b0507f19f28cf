"""One small tokenizer for all tests of the room, trained once on the standard library's own source."""

import json
from pathlib import Path

import pytest

from exaone_jax.text import Tokenizer, train_bpe

STDLIB = Path(json.__file__).parent.parent
KOREAN = "대한민국의 수도는 서울이다. 한국어 글자는 나뉘지 않는다. 생각하는 모델이 도구를 부른다. " * 40


@pytest.fixture(scope="session")
def korean() -> str:
    return KOREAN


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    names = ("argparse.py", "json/decoder.py", "textwrap.py", "heapq.py", "this.py")
    return [KOREAN, *((STDLIB / name).read_text(encoding="utf-8") for name in names)]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return train_bpe(corpus, 1400)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def exaone4_tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """As EXAONE 4.0's: added whitespace runs, bracket roles, markers that are not special, NFKC."""
    document = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    names = {4: "    ", 5: "  ", 34: "\t\t", 42: "<|endoftext|>", 52: "PI:URL"}
    names |= {57: "[|system|]", 58: "[|tool|]", 59: "[|assistant|]", 60: "[|user|]", 61: "[|endofturn|]"}
    vocab = document["model"]["vocab"]
    for token in document["added_tokens"]:
        del vocab[token["content"]]
        token["content"] = names.get(token["id"], token["content"])
        vocab[token["content"]] = token["id"]
        marker = token["id"] in (54, 55, 77, 78, 79, 80)
        token["special"], token["normalized"] = not marker, marker
    document["normalizer"] = {"type": "NFKC"}
    config = {"bos_token": "[BOS]", "eos_token": {"content": "[|endofturn|]"}, "pad_token": "[PAD]"}
    return Tokenizer(json.dumps(document), config=config)
