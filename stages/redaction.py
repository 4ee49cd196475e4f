"""Secrets of the environment, such as a hub token, do not get into logs, error messages and Prefect's page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_NAMES = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|AUTH_STRING|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # shorter values are no secrets, but words that occur everywhere


def redaction(environment: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces the values of secret variables in a text by the variables' names.

    Args:
        environment: names and values; a name that speaks of a token, key, password or secret makes its value one.
    """
    names = {
        value: name for name, value in environment.items() if _NAMES.search(name) and len(value.strip()) >= _SHORTEST
    }
    if not names:
        return lambda text: text
    # The longest first: one secret may be a part of another.
    found = re.compile("|".join(re.escape(value) for value in sorted(names, key=len, reverse=True)))
    return lambda text: found.sub(lambda match: f"<{names[match[0]]}>", text)
