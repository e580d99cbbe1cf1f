"""The parts of the comparison with torch that need no torch: the parties' protocol, and the tables."""

import json
import sys
import time

import pytest

from benchmarks import cpu_results, cpu_suite
from benchmarks.cpu_suite import Cell
from benchmarks.peers import protocol


def phases(rollout, update):
    """A round whose CPU seconds are these, on a machine that leaves a process half of a core."""
    seconds = {"rollout": rollout, "update": update, "total": rollout + update}
    return {name: {"wall": 2 * value, "cpu": value} for name, value in seconds.items()}


def measured(**rounds):
    return {**Cell(16, 10, False)._asdict(), "load": [1.0, 2.5], "seconds": {"rounds": 9.0}, "rounds": rounds}


CELL = measured(
    ours=[phases(1, 4), phases(2, 4), phases(9, 9)],
    trl=[phases(4, 2), phases(4, 2), phases(1, 1)],
    torch=[phases(2, 4)] * 3,
)
RESULTS = {
    "machine": {"cpu": "a processor", "system": "Linux x86_64"},
    "versions": {"ours": {"jax": "1"}, "trl": {"trl": "2"}, "torch": {"torch": "3"}},
    "cells": {"16x10-full": CELL},
}


def test_a_job_is_answered_with_its_result_or_with_what_it_raised():
    jobs = {"add": lambda a, b: a + b}
    assert protocol.read_answer(protocol.answer('{"job": "add", "a": 1, "b": 2}', jobs)) == 3
    for line in ('{"job": "add", "a": 1, "b": null}', '{"job": "other"}', "no JSON"):
        with pytest.raises(RuntimeError, match=r"TypeError|KeyError|JSONDecodeError"):
            protocol.read_answer(protocol.answer(line, jobs))
    with pytest.raises(RuntimeError, match="ended without an answer"):
        protocol.read_answer("")


def test_a_party_answers_in_turn_whatever_it_prints_and_ends_with_its_user(tmp_path, capfd):
    (tmp_path / "party.py").write_text(
        f"import sys; sys.path.insert(0, {str(cpu_suite.PEERS)!r})\n"
        "from protocol import serve\n"
        "serve({'double': lambda x: print('noise') or 2 * x, 'end': sys.exit})\n"
    )
    with cpu_suite.party([sys.executable, tmp_path / "party.py"]) as ask:
        assert [ask("double", x=x) for x in (1, "a")] == [2, "aa"]
        with pytest.raises(RuntimeError, match="ended without an answer"):
            ask("end")
        with pytest.raises(RuntimeError, match="ended without an answer"):
            ask("double", x=1)
    assert "noise" in capfd.readouterr().err


def test_phases_are_timed_by_the_wall_clock_and_by_the_process():
    spent = {}
    with protocol.timed(spent, "nap"):
        time.sleep(0.05)
    assert spent["nap"]["wall"] >= 0.05 > spent["nap"]["cpu"]


def test_ratios_are_of_the_medians_and_above_1_where_ours_is_faster():
    assert cpu_results.rate(CELL, "ours", "rollout", "cpu") == 16 / 2
    assert cpu_results.rate(CELL, "ours", "rollout", "wall") == 16 / 4
    assert cpu_results.ratio(CELL, "trl", "rollout", "cpu") == 2
    assert cpu_results.ratio(CELL, "trl", "update", "cpu") == 0.5
    assert cpu_results.ratio(CELL, "trl", "total", "wall") == 1


def test_results_are_written_and_a_cell_that_is_there_is_not_missing(tmp_path):
    assert cpu_results.missing(cpu_results.read(tmp_path), "16x10-full", 1)
    cpu_results.write(tmp_path, RESULTS)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS == cpu_results.read(tmp_path)
    assert [cpu_results.missing(RESULTS, "16x10-full", repeats) for repeats in (3, 4)] == [False, True]
    text = (tmp_path / "results.md").read_text()
    assert "| 16x10-full | 2.00 | 0.50 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "| 16x10-full | ddpo_jax | 8.00 | 4.00 | 2.67 | 2.5 |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_cells_are_named_by_their_numbers():
    assert cpu_suite.cells_of("16x10-full,2x3-lora") == [Cell(16, 10, False), Cell(2, 3, True)]
    assert cpu_suite.cells_of("") == list(cpu_suite.CELLS)
    assert cpu_suite.cells_of(",".join(cell.name for cell in cpu_suite.CELLS)) == list(cpu_suite.CELLS)
    with pytest.raises(SystemExit, match="expected BATCHxSTEPS"):
        cpu_suite.cells_of("16-full")
