"""Tables of what kernels cost: rows survive an interruption, and come back from the file's text."""

import json
import operator
import os
import tempfile

import pytest
import typer

from isokern.backends.resource_rows import Job, compile_rows, differences, rows_of, text_of, write_or_compare

FIRST, SECOND, THIRD = ("decode", 90, "a=1"), ("decode", 80, "a=1"), ("prompts", 90, "b=2")
ROWS = {FIRST: (95, 0, 32), SECOND: (128, 8, 0), THIRD: (7, 0, 0)}


@pytest.fixture(autouse=True)
def _temporary(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def jobs(known):
    """One for two rows and one for one; each looks its rows up by its number."""
    return [Job((FIRST, SECOND), (known, 0)), Job((THIRD,), (known, 1))]


def made_by(known):
    return compile_rows(jobs(known), operator.getitem, "table", processes=1, prepare=os.mkdir)


BOTH = {0: [ROWS[FIRST], ROWS[SECOND]], 1: [ROWS[THIRD]]}


def test_every_jobs_rows_come_back_in_order_and_nothing_is_left(tmp_path):
    made = made_by(BOTH)
    assert list(made.items()) == list(ROWS.items())
    assert list(tmp_path.iterdir()) == []


def test_what_was_compiled_before_an_interruption_is_not_compiled_again(tmp_path):
    with pytest.raises(KeyError):
        made_by({0: BOTH[0]})
    kept = tmp_path / "table" / "rows.jsonl"
    with kept.open("a") as file:
        file.write('["prompts", 90, "b=2", 1')  # cut off
    (tmp_path / "table" / "scratch").rmdir()
    assert made_by({1: BOTH[1]}) == ROWS


def test_a_line_that_was_cut_off_spoils_none_that_follows(tmp_path):
    (tmp_path / "table").mkdir()
    kept = tmp_path / "table" / "rows.jsonl"
    kept.write_text('["prompts", 90, "b=2", 1')
    with pytest.raises(KeyError):
        made_by({0: BOTH[0]})
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [[*k, *ROWS[k]] for k in (FIRST, SECOND)]


def test_a_job_of_which_a_row_is_missing_is_done_again(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "rows.jsonl").write_text(json.dumps([*FIRST, 1, 1, 1]) + "\n")
    assert made_by(BOTH) == ROWS


def test_a_job_makes_as_many_rows_as_it_has_keys():
    with pytest.raises(ValueError, match="zip"):
        made_by({**BOTH, 1: []})


def test_a_table_is_read_back_as_it_was_written():
    text = text_of({"fingerprint": "x", "columns": ["registers"]}, ROWS)
    assert '"a=1": [95, 0, 32]' in text
    table = json.loads(text)
    assert rows_of(table) == ROWS
    assert (table["fingerprint"], table["columns"]) == ("x", ["registers"])


def test_differences_name_changed_new_and_missing_rows():
    assert list(differences(ROWS, dict(ROWS))) == []
    other = {FIRST: (96, 0, 32), SECOND: ROWS[SECOND], ("tree", 90, "c=3"): (1,)}
    assert [line.split(":")[0] for line in differences(ROWS, other)] == [
        str(key) for key in sorted([FIRST, THIRD, ("tree", 90, "c=3")])
    ]


def test_a_table_is_rewritten_or_what_it_says_otherwise_is_said(tmp_path, capsys):
    table, made = tmp_path / "table.json", {("decode", 90, "a"): (1, 2), ("decode", 90, "b"): (3, 4)}

    def listed():
        return rows_of(json.loads(table.read_text()))

    write_or_compare(True, table, {"compiler": "1"}, made, listed)  # there is none yet to look at
    assert json.loads(table.read_text())["compiler"] == "1"
    write_or_compare(False, table, {}, made, listed)
    assert capsys.readouterr().err == ""
    before = table.read_text()
    with pytest.raises(typer.Exit) as ended:
        write_or_compare(False, table, {}, {**made, ("decode", 90, "b"): (3, 5)}, listed)
    assert ended.value.exit_code == 1
    assert "(3, 5)" in capsys.readouterr().err
    assert table.read_text() == before
