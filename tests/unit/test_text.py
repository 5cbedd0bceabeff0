"""Tables and number ranges."""

from megachat.text import markdown_table, number_ranges, plural, text_table


def test_columns_are_aligned():
    assert text_table([("task", "n", ""), ("a", "1,000", "new")], right=[1]) == ["task      n", "a     1,000  new"]
    assert text_table([("a", "b"), ("long", "")]) == ["a     b", "long"]


def test_a_markdown_table_has_a_line_below_its_titles():
    assert markdown_table([("task", "n"), ("a", "1,000")]) == ["| task | n |", "| --- | --- |", "| a | 1,000 |"]


def test_number_ranges():
    assert [number_ranges(numbers) for numbers in ([], [5], [0, 1, 2, 4, 6, 7])] == ["", "5", "0-2,4,6-7"]


def test_plurals():
    assert [plural(count, "micro-batch") for count in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
    assert plural(1000, "rank") == "1,000 ranks"
