"""Text of others in messages: one line, no control characters, never long."""

from groundingdino.runtime.messages import brief, printable, some


def test_what_cannot_be_printed_is_escaped():
    assert printable("a\nb\x1b[31m\u202e\ud800é") == "a\\nb\\x1b[31m\\u202e\\ud800é"


def test_a_text_of_the_limit_is_whole_and_a_longer_one_is_cut():
    assert brief("a" * 200) == "a" * 200 and brief("a" * 201) == "a" * 200 + "..."
    assert brief("abc", 3) == "abc" and brief("abcd", 3) == "abc..."


def test_the_first_few_names_stand_for_all():
    assert some(["a", "b", "c"]) == "a, b, c" and some(["a", "b", "c", "d"]) == "a, b, c, ..."
    assert some(str(number) for number in range(3)) == "0, 1, 2" and some([]) == ""
