"""Texts that are there wherever this package's environment is: to calibrate on, and, apart from them, to measure on.

Sources are the language reference inside the standard library (`pydoc_data.topics`), docstrings of standard library
modules, and READMEs in the metadata of packages that serving needs anyway. Whole documents go to one side, and a
paragraph that also occurs on the held-out side is dropped from the calibration side (the language reference repeats
some of its sections).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

_README_PACKAGES = (
    "aiohttp", "anyio", "charset-normalizer", "fastapi", "filelock", "httpx", "huggingface-hub", "jinja2", "jsonschema",
    "numpy", "openai", "pydantic", "python-dotenv", "ray", "redis", "regex", "requests", "rich", "safetensors",
    "sentencepiece", "tiktoken", "tokenizers", "torch", "tqdm", "transformers", "typer", "uvicorn", "yarl",
)  # fmt: skip
_STDLIB_MODULES = (
    "argparse", "bdb", "calendar", "codecs", "configparser", "copy", "csv", "datetime", "decimal", "difflib", "doctest",
    "enum", "fractions", "functools", "heapq", "imaplib", "inspect", "ipaddress", "locale", "optparse", "pathlib",
    "pickle", "pickletools", "pprint", "random", "shutil", "socket", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "trace", "turtle", "typing", "unittest/case", "urllib/request", "zipfile",
)  # fmt: skip

CHAT_PROMPTS = (
    "Tell me a short story about a fox.",
    "What is gravity?",
    "Write a Python function that adds two numbers.",
    "How do I cook rice?",
    "Who was Ada Lovelace?",
    "Explain photosynthesis to a child.",
    "List three European capitals and the countries they belong to.",
    "Why do leaves change colour in autumn?",
    "Give me advice on learning the guitar.",
    "Summarise the plot of Romeo and Juliet.",
    "What is 12 times 7?",
    "Write a polite email to my boss asking for a day off.",
    "What is the largest planet in the solar system?",
    "Describe a sunny day at the beach.",
    "How does a refrigerator work?",
    "What are the benefits of regular exercise?",
    "Who wrote Pride and Prejudice?",
    "Explain what a computer network is.",
    "What should I pack for a trip to the mountains?",
    "Write a poem about the sea.",
    "What causes rain?",
    "How can I sleep better at night?",
    "What is the difference between a cat and a dog?",
    "Tell me about the history of Rome.",
    "What is the capital of Italy?",
    "Why is the ocean salty?",
    "How do I bake bread?",
    "Write a short story about a lost dog.",
    "What is the tallest mountain on Earth?",
    "How do aeroplanes stay in the air?",
    "What is machine learning?",
    "Who painted the Mona Lisa?",
    "Give me three tips for saving money.",
    "What is the boiling point of water?",
    "Why do we dream?",
    "Describe how a bicycle works.",
    "What did the Romans eat for breakfast?",
    "How do I make a good cup of coffee?",
    "What is the moon made of?",
    "Explain how a volcano erupts.",
    "Which language is spoken in Brazil?",
    "Write a short story about a dragon and a princess.",
    "How do plants grow from seeds?",
    "What is democracy?",
    "Recommend a book for a rainy weekend.",
    "Why is it important to drink water?",
    "What happened in the year 1969?",
    "Say hello and introduce yourself.",
)
"""What the dense model is asked for calibration, so that the sliced one stays good at conversation."""


@dataclass(frozen=True)
class Texts:
    """Prose documents, split so that no paragraph is on both sides."""

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]


def collect(held_out_share: float = 0.25) -> Texts:
    """All documents, about `held_out_share` of them held out.

    A document's side follows from a hash of its name, so it depends on nothing else that is installed.
    """
    documents = {name: paragraphs for name, paragraphs in _documents() if paragraphs}
    held_out = {name for name in documents if _unit_hash(name) < held_out_share}
    seen = {paragraph for name in held_out for paragraph in documents[name]}
    calibration = [
        [paragraph for paragraph in documents[name] if paragraph not in seen]
        for name in sorted(documents.keys() - held_out)
    ]
    return Texts(
        calibration=tuple("\n\n".join(paragraphs) for paragraphs in calibration if paragraphs),
        held_out=tuple("\n\n".join(documents[name]) for name in sorted(held_out)),
    )


def token_windows(texts: Iterable[str], tokenizer: Any, length: int, count: int, seed: int) -> list[list[int]]:
    """At most `count` windows of exactly `length` tokens, none across two texts, none overlapping, in seeded order."""
    windows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        windows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    random.Random(seed).shuffle(windows)
    return windows[:count]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: long enough, mostly letters and spaces, no table or badge."""
    if len(paragraph) < 120 or "http" in paragraph or "|" in paragraph:
        return False
    plain = sum(character.isalpha() or character in " ,." for character in paragraph)
    return plain / len(paragraph) > 0.92


def _documents() -> Iterator[tuple[str, list[str]]]:
    for name, text in topics.items():
        yield f"topic/{name}", _paragraphs(text)
    library = Path(sysconfig.get_path("stdlib"))
    for module in _STDLIB_MODULES:
        source = library / f"{module}.py"
        if source.is_file():
            yield f"docstrings/{module}", _paragraphs("\n\n".join(_docstrings(source.read_text(encoding="utf-8"))))
    for package in _README_PACKAGES:
        try:
            readme = importlib.metadata.metadata(package).json.get("description", "")
        except importlib.metadata.PackageNotFoundError:
            continue
        yield f"readme/{package}", _paragraphs(str(readme))


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield inspect.cleandoc(text)


def _paragraphs(text: str) -> list[str]:
    blocks = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(block for block in blocks if is_prose(block)))


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
