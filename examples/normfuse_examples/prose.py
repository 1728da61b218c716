"""English sentences for training, as text and as batches of tokens.

Any machine with Python has the documentation inside the sources of its packages; a WordNet adds everyday words.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_TOKENS = 64
POOL = 8192  # sentences that are sorted by length together
HELD_OUT = 300
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def sentences_of(text: str) -> list[str]:
    """The sentences of running text: 15 to 300 characters, at least four fifths of them letters and spaces."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _END.split(" ".join(paragraph.split())):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if 15 <= len(sentence) <= 300 and letters >= 0.8 * len(sentence):
                found.append(sentence)
    return found


def texts(source: str) -> Iterator[str]:
    """Docstrings and comments of more than one line."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # test data for parsers, templates
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.lstrip().startswith("# "):
            block.append(line.strip()[2:])
        else:
            if len(block) > 1:
                yield " ".join(block)
            block = []


def sources() -> Iterable[Path]:
    """The Python files of the standard library and of all installed packages."""
    paths = sysconfig.get_paths()
    folders = dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    return dict.fromkeys(file for folder in folders for file in sorted(folder.rglob("*.py")))


def sentences() -> list[str]:
    """All distinct sentences of the documentation on this machine, sorted."""
    found: set[str] = set()
    for file in sources():
        for text in texts(file.read_text(encoding="utf-8", errors="ignore")):
            found.update(sentences_of(text))
    return sorted(found)


def glosses(folder: Path) -> list[str]:
    """All distinct definitions and example sentences of at least 15 characters in a WordNet's data files, sorted."""
    found: set[str] = set()
    for file in sorted(folder.glob("data.*")):
        for line in file.read_text(encoding="utf-8").splitlines():
            _, bar, gloss = line.partition(" | ")
            if bar:
                definition, *quoted = gloss.split('"')
                found.update(text.strip(" ;,-") for text in (definition, *quoted[::2]))
    if not found:
        raise SystemExit(f"{folder} holds no data files of WordNet; Debian's package wordnet-base has them")
    return sorted(text for text in found if len(text) >= 15)


Batch = dict[str, Tensor]


def padded(rows: list[np.ndarray]) -> Batch:
    """Sentences of different lengths as one batch."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for target, valid, row in zip(ids, mask, rows, strict=True):
        target[: len(row)], valid[: len(row)] = row, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


class Text:
    """Tokenised sentences by source: "documentation" of this machine and, if asked for, "dictionary".

    The first ``HELD_OUT`` of each source are held out.

    Args:
        tokenizer: of transformers.
        file: where the tokens of the documentation are, or will be, kept.
        share_mixed: how many of the sentences in batches have half their words replaced.
        wordnet: folder of a WordNet for the dictionary; None: documentation alone.
    """

    def __init__(self, tokenizer: Any, file: Path, share_mixed: float = 0.5, wordnet: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.share_mixed = share_mixed
        if not file.exists():
            rows = self._shuffled(sentences())
            np.savez(file, ids=np.concatenate(rows), ends=np.cumsum([len(row) for row in rows]))
        words = ((index, word) for word, index in tokenizer.get_vocab().items())
        # The vocabulary is ordered by how frequent words are.
        self.words = [index for index, word in sorted(words) if word.isascii() and word.isalpha() and len(word) > 1]
        stored = np.load(file)
        rows = {"documentation": np.split(stored["ids"], stored["ends"][:-1])}
        if wordnet is not None:
            rows["dictionary"] = self._shuffled(glosses(wordnet))
        self.held_out = {name: some[:HELD_OUT] for name, some in rows.items()}
        self.training = {name: some[HELD_OUT:] for name, some in rows.items()}

    def _shuffled(self, lines: list[str]) -> list[np.ndarray]:
        random.Random(0).shuffle(lines)
        return self.tokenize(lines)

    def tokenize(self, lines: list[str]) -> list[np.ndarray]:
        rows = []
        for start in range(0, len(lines), 1000):
            some = self.tokenizer(lines[start : start + 1000], truncation=True, max_length=MAX_TOKENS)
            rows += [np.array(row, dtype=np.int32) for row in some["input_ids"]]
        return rows

    def mixed(self, row: np.ndarray, generator: random.Random) -> np.ndarray:
        """A sentence with half its words replaced by others of the vocabulary, frequent ones more often.

        Documentation uses few of the words that people do; the original says what any sequence of words should give.
        """
        row = row.copy()
        for place in range(1, len(row) - 1):
            if generator.random() < 0.5:
                row[place] = self.words[int(len(self.words) ** generator.random()) - 1]
        return row

    def batches(self, tokens: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Endless batches of about ``tokens`` tokens, of sentences of nearly equal length, from number ``skip``.

        As many sentences of each source. A share ``share_mixed`` of the sentences is :meth:`mixed`.
        """
        generator = random.Random(seed)
        number = 0
        while True:
            count = POOL // len(self.training)
            pool = [row for rows in self.training.values() for row in generator.sample(rows, min(count, len(rows)))]
            pool.sort(key=len)
            groups, start = [], 0
            for index, row in enumerate(pool):
                if (index - start + 1) * len(row) > tokens and index > start:
                    groups.append(pool[start:index])
                    start = index
            groups.append(pool[start:])
            generator.shuffle(groups)
            for group in groups:
                rows = [self.mixed(row, generator) if generator.random() < self.share_mixed else row for row in group]
                if number >= skip:
                    yield padded(rows)
                number += 1
