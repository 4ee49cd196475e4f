"""The demo's taste: what a good answer of a help desk is, as a number from 0 to 1 that a reader can check.

    score = short x complete x on_topic x substance x polite x fresh x readable

A good answer is

- short:      12 to 30 words. Shorter ones lose in proportion, longer ones until nothing is left at 45.
- complete:   it ends with a full stop, exclamation or question mark. Cut off, only its finished sentences count.
- on_topic:   it names what was asked about: two content words of the question, or the only one. One of several: 0.8.
- substance:  it says something that was not in the question: four other content words.
- polite:     it has one courtesy, such as "happy to help". A second one is too much, a third is flattery.
- fresh:      it does not repeat itself: no sentence twice, few runs of three words twice, no word over and over.
- readable:   it is made of sentences, not of keywords: a quarter of its words are small words ("the", "to", "is").

The factors are multiplied, so that an answer is no better than its worst side: parroting the question, listing
keywords or piling up courtesies all score low. All but the last two keep a remainder when they fail entirely
(`REMAINDERS`), so that an answer with one fault still scores above an answer with two.

The judge labels the demo's preference pairs and measures the result. PPO never sees it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

MIN_WORDS, MAX_WORDS, TOO_MANY_WORDS = 12, 30, 45
REMAINDERS = {"short": 0.1, "complete": 0.4, "on_topic": 0.3, "substance": 0.2, "polite": 0.5}

COURTESIES = (
    r"(?:happy|glad|pleased) to help",
    r"thank you",
    r"thanks",
    r"(?:good|great|nice) question",
    r"(?:i )?hope (?:this|that|it) helps",
    r"you(?:'re| are) welcome",
    r"please",
    r"good luck",
    r"let me know",
    r"feel free",
    r"of course",
    r"have fun",
    r"with pleasure",
)
_COURTESY = re.compile(r"\b(?:" + "|".join(COURTESIES) + r")\b")


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that carry no topic: small words, and the verbs and nouns with which people ask for help.
SMALL_WORDS = _listed(
    """
    a about above after again all almost also although always am among an and another any anyone anything are around
    as at away back be because been before being below best better between both but by can cannot could did do does
    doing done down during each either else enough even ever every everything few first for from further get gets
    getting give go going good got had has have having he her here hers him his how i if in instead into is it its
    itself just keep know last least less let like little long look lot made main make makes making many may me mean
    might mine more most much must my need needs never new next no nor not nothing now of off often on once one only
    or other our out over own per put quite rather really right same say see seem shall she should since so some
    something sometimes soon still such sure take tell than that the their them then there these they thing things
    think this those though through to together too try two under until up upon us use used using usually very want
    was way ways we well were what when where whether which while who whole whom whose why will with within without
    would yes yet you your yours yourself don't doesn't isn't aren't can't won't it's i'm i've i'd you're you'll
    that's there's let's what's they're we're didn't wouldn't shouldn't
    """
)
ASKING_WORDS = _listed(
    """
    adult advice answer ask asked asking beginner birthday borrow bring budget cheap checklist child children
    choose colleague compare complained contain deal decide decision describe difference doctor easy email enjoy
    explain explanation family fix forget friend friendly friends gift grandmother happy hard help helpful hint
    hour idea interesting kind kinder learn lent matter mention mind minute mother need neighbour nervous
    newspaper nicest note one people person plain plan please polite prefer prepare present problem question
    quick ready recipe recommend reply rewrite school secret sentence share short should simple sister small
    somebody someone son sound special start step struggle student success suggest suit summarize surprise talk
    taste tell thank thing time tip today treat trick true try understand understood version view week wonder
    word work worn write wrong year
    """
)

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


def judge(prompts: Sequence[object], completions: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """Score a batch of answers.

    Args:
        prompts: the questions: texts, or conversations as lists of `{"role", "content"}`.
        completions: the answers.
        columns: the rows' other columns; the judge needs none.

    Returns:
        One score from 0 (worst) to 1 for each answer.
    """
    return [score(question(prompt), completion) for prompt, completion in zip(prompts, completions, strict=True)]


def score(asked: str, answer: str) -> float:
    """The product of the criteria, each no lower than its remainder."""
    result = 1.0
    for name, value in criteria(asked, answer).items():
        remainder = REMAINDERS.get(name, 0.0)
        result *= remainder + (1 - remainder) * value
    return round(result, 4) if _words(answer) else 0.0


def criteria(asked: str, answer: str) -> dict[str, float]:
    """How far the answer meets each criterion, from 0 to 1, before remainders."""
    words = _words(answer)
    return {
        "short": _short(len(words)),
        "complete": _complete(answer),
        "on_topic": _on_topic(asked, words),
        "substance": _substance(asked, answer),
        "polite": {0: 0.0, 1: 1.0, 2: 0.5}.get(len(_COURTESY.findall(_plain(answer))), 0.0),
        "fresh": _fresh(answer, words),
        "readable": min(1.0, 4 * sum(word in SMALL_WORDS for word in words) / max(len(words), 1)),
    }


def question(prompt: object) -> str:
    """What the user asked last."""
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, Sequence)
    turns = [turn for turn in prompt if isinstance(turn, Mapping) and turn["role"] == "user"]
    return str(turns[-1]["content"]) if turns else ""


def topic_stems(text: str) -> list[str]:
    """The content words of a text without their endings, each once, in order."""
    stems = [_stem(word) for word in _words(text) if len(word) > 2 and word not in SMALL_WORDS]
    return list(dict.fromkeys(stem for stem in stems if stem not in _asking_stems()))


@lru_cache
def _asking_stems() -> frozenset[str]:
    return frozenset(map(_stem, ASKING_WORDS))


def _short(count: int) -> float:
    if count <= MAX_WORDS:
        return min(1.0, count / MIN_WORDS)
    return max(0.0, (TOO_MANY_WORDS - count) / (TOO_MANY_WORDS - MAX_WORDS))


def _complete(answer: str) -> float:
    answer = answer.rstrip()
    ends = list(_SENTENCE_END.finditer(answer))
    if not ends:
        return 0.0
    if ends[-1].end() == len(answer):
        return 1.0
    return 0.7 * len(_words(answer[: ends[-1].end()])) / max(len(_words(answer)), 1)


def _on_topic(asked: str, words: Sequence[str]) -> float:
    wanted = topic_stems(asked)
    if not wanted:
        return 1.0
    said = {_stem(word) for word in words}
    found = sum(stem in said for stem in wanted)
    return 1.0 if found >= min(2, len(wanted)) else 0.8 * found


def _substance(asked: str, answer: str) -> float:
    asked_stems = {_stem(word) for word in _words(asked)}
    said = {_stem(word) for word in _words(_COURTESY.sub(" ", _plain(answer))) if word not in SMALL_WORDS}
    return min(1.0, len(said - asked_stems) / 4)


def _fresh(answer: str, words: Sequence[str]) -> float:
    sentences = [" ".join(_words(part)) for part in _SENTENCE_END.split(answer)]
    sentences = [sentence for sentence in sentences if sentence]
    sentence_factor = 0.4 ** (len(sentences) - len(set(sentences)))
    runs = list(zip(words, words[1:], words[2:], strict=False))
    run_factor = max(0.0, 1 - 2 * (1 - len(set(runs)) / len(runs))) if runs else 1.0
    counts = Counter(_stem(word) for word in words if word not in SMALL_WORDS)
    often = max(counts.values(), default=0)
    word_factor = {4: 0.6}.get(often, 1.0 if often < 4 else 0.1)
    return sentence_factor * run_factor * word_factor


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def _words(text: str) -> list[str]:
    return _WORD.findall(_plain(text))


def _stem(word: str) -> str:
    """A word without its commonest endings, so that "plants" and "planting" are about a plant."""
    word = word.removesuffix("'s")
    for ending in ("ing", "ies", "ed", "es", "s", "ly", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    # running -> runn -> run
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word
