"""Traces of steps, and the times of a step's parts."""

import logging
from pathlib import Path

import torch
from training_runs import small_config

from groundingdino.training.profiling import StepProfiler, longest_in_tables
from groundingdino.training.step_clock import StepClock
from groundingdino.training.trainer import fit


def test_a_profiled_run_leaves_a_trace_and_names_the_ten_longest_operators(data: Path, tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, logger="groundingdino")
    fit(small_config(data, tmp_path / "run", epochs=1, profile="2:4", deterministic=True))
    assert (tmp_path / "run" / "profile" / "trace.json").stat().st_size > 1000
    lines = [record.getMessage() for record in caplog.records]
    start = next(n for n, line in enumerate(lines) if "trace of steps 2 to 3" in line)
    assert all(" calls  " in line for line in lines[start + 1 : start + 11])


def test_a_trace_holds_its_steps_and_not_the_one_before_or_behind(tmp_path: Path):
    profiler = StepProfiler("2:3", tmp_path, torch.device("cpu"))
    for step, operator in enumerate((torch.sin, torch.cos, torch.tan), start=1):
        profiler.before(step)
        operator(torch.ones(3))
    profiler.close()
    trace = (tmp_path / "trace.json").read_text()
    assert [f"aten::{name}" in trace for name in ("sin", "cos", "tan")] == [False, True, False]


def test_the_tables_of_torch_npus_profiler_are_read(tmp_path: Path):
    (tmp_path / "card" / "ASCEND_PROFILER_OUTPUT").mkdir(parents=True)
    table = "Device_id,OP Type,Core Type,Count,Total Time(us)\n0,Add,AI_VECTOR_CORE,5,90.0\n0,MatMul,AI_CORE,2,2500.0\n"
    (tmp_path / "card" / "ASCEND_PROFILER_OUTPUT" / "op_statistic.csv").write_text(table)
    first, second = longest_in_tables(tmp_path)
    assert first.split() == ["2.50", "ms", "2", "calls", "MatMul"] and second.endswith("Add")
    (only,) = longest_in_tables(tmp_path / "empty")
    assert "no op_statistic.csv" in only


def test_the_parts_of_a_step_are_added_and_then_forgotten():
    clock = StepClock(torch.device("cpu"))
    clock.add("data", 0.5)
    clock.start()
    for part in ("forward", "backward", "forward", "backward"):
        clock.mark(part)
    seconds = clock.take().seconds()
    assert set(seconds) == {"data", "forward", "backward"} and seconds["data"] == 0.5
    assert clock.take().seconds() == {}
