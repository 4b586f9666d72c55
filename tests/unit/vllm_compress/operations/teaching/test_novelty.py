"""MinHash finds what is nearly the same, and nothing that is not."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.teaching.novelty import THRESHOLD, Novelty, jaccard, runs

WORDS = ["list", "name", "write", "explain", "tell", "city", "river", "word", "poem", "sum"]
WORDS += ["short", "long", "why", "how", "seven", "red"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=4, max_size=30).map(" ".join)


@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_whatever_is_kept_differs_and_whatever_is_not_has_its_like(texts: list[str]) -> None:
    novelty, kept = Novelty(), list[str]()
    for text in texts:
        alike = [one for one in kept if jaccard(runs(one), runs(text)) >= THRESHOLD]
        if novelty.add(text):
            kept.append(text)
        else:
            assert alike, text
        assert not novelty.add(f"  {text.upper()}!"), "the same but for case and signs"


def test_nearly_all_that_is_alike_is_found() -> None:
    """As an exact comparison of all with all has it."""
    chance = random.Random(0)
    missed = alike = 0
    for _ in range(80):
        words = chance.choices(WORDS, k=40)
        changed = list(words)
        for place in chance.sample(range(40), chance.randint(1, 4)):
            changed[place] = chance.choice(WORDS)
        one, other = " ".join(words), " ".join(changed)
        novelty = Novelty()
        novelty.add(one)
        if jaccard(runs(one), runs(other)) >= THRESHOLD:
            alike += 1
            missed += novelty.add(other)
        else:
            assert novelty.add(other)
    assert alike > 20
    assert missed <= alike / 20


def test_another_ending_makes_no_new_text_and_another_subject_does() -> None:
    novelty = Novelty()
    assert novelty.add("Write a poem about the rain in Paris.")
    assert not novelty.add("Write a poem about the rain in Paris, please!")
    assert novelty.add("Write a poem about the bridges of London.")


def test_texts_without_letters_are_alike() -> None:
    novelty = Novelty()
    assert novelty.add("!!")
    assert not novelty.add("")
