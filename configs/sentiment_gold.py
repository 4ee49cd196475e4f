"""A gold measure for `sentiment.yaml`: how favourable a film review is, by people's ratings.

Ridge regression on tf-idf of words and word pairs, fitted on rated snippets that stand in no other file, so that
it knows nothing of the reward model nor of its data. Needs `data/sentiment_gold_train.jsonl` (docs/results.md).
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

RATED = Path(__file__).resolve().parent.parent / "data" / "sentiment_gold_train.jsonl"
RIDGE = 1.0


def features(text: str) -> Counter[str]:
    """Counts of the words and word pairs of a text."""
    words = re.findall(r"[a-z']+", text.lower())
    return Counter([*words, *(f"{left} {right}" for left, right in pairwise(words))])


class Regression:
    """Ratings of -4 to 4 from texts, solved in the dual (there are more features than texts)."""

    def __init__(self, texts: Sequence[str], ratings: Sequence[float]) -> None:
        counted = [features(text) for text in texts]
        documents = Counter(name for counts in counted for name in counts)
        names = sorted(name for name, count in documents.items() if count >= 2)
        self.column = {name: index for index, name in enumerate(names)}
        self.idf = np.array([np.log((1 + len(texts)) / (1 + documents[name])) + 1 for name in names])
        matrix = self.matrix(counted)
        self.mean = float(np.mean(ratings))
        gram = matrix @ matrix.T + RIDGE * np.eye(len(texts))
        self.weights = matrix.T @ np.linalg.solve(gram, np.asarray(ratings) - self.mean)

    def matrix(self, counted: Sequence[Counter[str]]) -> np.ndarray:
        """Rows of unit length: (1 + log count) x idf."""
        rows = np.zeros((len(counted), len(self.column)))
        for row, counts in enumerate(counted):
            for name, count in counts.items():
                if name in self.column:
                    rows[row, self.column[name]] = (1 + np.log(count)) * self.idf[self.column[name]]
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def predict(self, texts: Sequence[str]) -> list[float]:
        """The rating that people would give, in their units."""
        predictions = self.matrix([features(text) for text in texts]) @ self.weights + self.mean
        return [float(value) for value in predictions]


@functools.cache
def regression() -> Regression:
    """The fitted model; fitted once a process."""
    rows = [json.loads(line) for line in RATED.read_text(encoding="utf-8").splitlines()]
    return Regression([row["text"] for row in rows], [row["rating"] for row in rows])


def favour(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """The predicted rating of each whole review, prompt included."""
    reviews = [
        f"{prompt}{completion}".removeprefix("Movie review:")
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return regression().predict(reviews)
