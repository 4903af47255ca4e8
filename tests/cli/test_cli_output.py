"""How numbers look, and that tables reach a pipe whole."""

from __future__ import annotations

import json

import pytest

from agentmem.cli import output


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (411_800_000, "412 MB"),
        (999_600_000, "1.0 GB"),
        (1_100_000_000_000, "1.1 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert output.format_bytes(count) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (0.04, "0.0 ms"),
        (8.44, "8.4 ms"),
        (412.3, "412 ms"),
        (999.6, "1.00 s"),
        (59_990, "59.99 s"),
        (59_999, "1m00s"),
        (842_000, "14m02s"),
        (7_260_000, "2h01m"),
    ],
)
def test_times(milliseconds: float | None, text: str) -> None:
    assert output.format_ms(milliseconds) == text


@pytest.mark.parametrize(
    ("age", "text"), [(0.2, "now"), (12, "12s ago"), (150, "2m ago"), (7200, "2h ago"), (5 * 86400, "5d ago")]
)
def test_ages(age: float, text: str) -> None:
    assert output.format_ago(1000.0, now=1000.0 + age) == text


def test_counts_and_shares() -> None:
    assert output.format_count(18432) == "18 432"
    assert output.format_share(978, 1000) == "97.8"
    assert output.format_share(0, 0) == "-"


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a" * 100
    output.print_table(("AGENT", "SIZE"), [(name, "1"), ("[bold]b", "22")], right=("SIZE",))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["AGENT", "SIZE"]
    assert first.split() == [name, "1"]
    assert second.split() == ["[bold]b", "22"]
    assert first.rstrip().endswith(" 1")
    assert second.rstrip().endswith(" 22")


def test_json_carries_the_schema_version_first(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"text": "Stra\u00dfe"}, compact=True)
    line = capsys.readouterr().out
    assert line.startswith('{"schema_version": 1, ')
    assert line.count("\n") == 1
    assert json.loads(line)["text"] == "Stra\u00dfe"


def test_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("[red]not markup[/red]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[red]not markup[/red]\n"
