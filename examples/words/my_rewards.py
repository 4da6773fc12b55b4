"""Rewards for spelling a word backward. Every column of the data is an argument; `word` is one."""


def reversed_word(completions, word, **_):
    """Return 1 where the text after #### is the word backward, else 0."""
    return [float(_answer(text) == one[::-1]) for text, one in zip(completions, word, strict=True)]


def right_letters(completions, word, log_metric, **_):
    """Return the share of places with the right letter: partial credit, which is not correctness."""
    found = [_answer(text) for text in completions]
    log_metric("length_error", sum(abs(len(a) - len(b)) for a, b in zip(found, word, strict=True)) / len(word))
    return [
        sum(a == b for a, b in zip(given, one[::-1], strict=False)) / max(len(given), len(one))
        for given, one in zip(found, word, strict=True)
    ]


def _answer(text):
    return text.rpartition("#### ")[2].strip()
