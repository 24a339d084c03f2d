"""Facts as a page of text."""

from __future__ import annotations

from collections.abc import Iterable

Fact = tuple[str, str]  # a label, and what there is to say


def page(sentence: str, facts: Iterable[Fact]) -> str:
    """The sentence, and a line for each fact, their texts below each other."""
    facts = list(facts)
    width = max((len(label) for label, _ in facts), default=0)
    return "\n".join([sentence, *(f"  {label:{width}}  {text}" for label, text in facts)])


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in words: 0, 2, 5 to 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
