"""The exceptions: one printable line each, whatever a file put into the message."""

import pickle

import numpy as np
import pytest

from cupyep import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CupyepError)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n  two\r\nthree", "one two three"),
        ("red \x1b[31m, bell \x07, \u202e back", r"red \x1b[31m, bell \x07, \u202e back"),
        ("no text \udcff", r"no text \udcff"),
        ("größer 大", "größer 大"),
        ("x" * 5000, "x" * 1000 + "..."),
    ],
)
def test_messages_are_one_printable_line(kind, text, message):
    error = kind(text)
    assert str(error) == message
    assert error.args == (message,)
    assert str(pickle.loads(pickle.dumps(error))) == message


def test_a_type_is_shown_by_its_name():
    """One of NumPy has a shape, as its numbers do."""
    assert errors.shown(np.float16) == "<class 'numpy.float16'>"
