"""Which formulation is chosen: the fastest correct one, as measured on this card with these versions."""

import dataclasses

import pytest
import torch

from groundingdino.cli import selfcheck
from groundingdino.runtime import tuning
from groundingdino.runtime.tuning import Case, Measured, Table

RIGHT = torch.tensor([1.0, 2.0])
CARD = torch.device("meta")  # a device other than the CPU that every machine has


def fails():
    raise RuntimeError("out of memory\nand more")


def case(name: str = "large", **calls) -> Case:
    return Case(name, lambda: (RIGHT,), {key: lambda value=value: value() for key, value in calls.items()})


def right():
    return (RIGHT + 1e-5,)


def clock(times: dict[str, float]):
    return lambda name, call: times[name]


@pytest.mark.parametrize("fastest", ["a", "b"])
def test_the_choice_follows_the_times_of_all_cases_together(fastest):
    times = {"a": 3.0, "b": 2.0} if fastest == "b" else {"a": 1.0, "b": 2.0}
    found = tuning.measure([case("small", a=right, b=right), case(a=right, b=right)], clock(times))
    assert found.fastest() == fastest and found.milliseconds == {"small": times, "large": times}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: (RIGHT + 0.1,), "wrong by 5.0e-02 of the largest entry in large"),
        (lambda: (RIGHT * float("nan"),), "wrong by inf"),
        (lambda: (RIGHT[:1],), "wrong by inf"),
        (fails, "out of memory in large"),
    ],
    ids=["wrong", "not finite", "another shape", "fails"],
)
def test_a_wrong_or_failing_formulation_is_refused_however_fast_it_is(wrong, why):
    cases = [
        case("small", quick=right, slow=right),
        case(quick=wrong, slow=right),
        case("last", quick=right, slow=right),
    ]
    found = tuning.measure(cases, clock({"quick": 0.1, "slow": 9.0}))
    assert found.fastest() == "slow" and why in found.refused["quick"]
    assert "quick" not in found.milliseconds["last"]


def test_where_nothing_is_right_nothing_is_chosen():
    assert tuning.measure([case(a=fails)], clock({})).fastest() is None


def test_cases_that_only_have_to_be_right_are_not_timed():
    found = tuning.measure([dataclasses.replace(case("exact", a=right, b=fails), timed=False)], clock({}))
    assert found.milliseconds == {} and list(found.refused) == ["b"]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> dict[str, str]:
    """This machine's card and versions, which a test may change, and an empty cache."""
    found = {"device": "npu", "card": "Ascend910B3", "CANN": "8.5.0"}
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "machine", lambda device: dict(found))
    return found


def fresh_choice(operation: str) -> str | None:
    tuning._choices.cache_clear()  # as in another process
    return tuning.choice(CARD, operation)


def test_a_kept_table_is_used_and_says_nothing_about_other_operations(machine):
    assert fresh_choice("attention") is None
    tuning.save_table(Table(dict(machine), {"attention": Measured({"large": {"a": 1.0, "b": 2.0}})}), CARD)
    assert fresh_choice("attention") == "a" and fresh_choice("other") is None
    assert tuning.choice(torch.device("cpu"), "attention") is None


@pytest.mark.parametrize("part", ["card", "CANN"])
def test_a_table_of_another_card_or_version_is_ignored(machine, part, caplog):
    path = tuning.save_table(Table(dict(machine), {"attention": Measured({"large": {"a": 1.0}})}), CARD)
    old = machine[part]
    machine[part] = "another"
    if part == "card":  # the same file's name, as for a card whose name differs in punctuation
        path.rename(tuning.table_path(CARD))
    assert fresh_choice("attention") is None
    assert f"measured with {part} {old}" in caplog.text


@pytest.mark.parametrize("content", ["", "{", '{"machine": 3}'])
def test_a_damaged_table_is_ignored(machine, content, caplog):
    path = tuning.save_table(Table(dict(machine), {}), CARD)
    path.write_text(content)
    assert fresh_choice("attention") is None and "is left unread" in caplog.text


def test_the_choice_is_a_constant_for_the_compiler():
    compiled = torch.compile(
        lambda x: x + (tuning.choice(x.device, "attention") is None), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(2)).tolist() == [1, 1]


def test_tuning_a_cpu_is_refused_in_one_line(capsys):
    assert selfcheck.main(["--device", "cpu", "--tune"]) == 2
    assert "there is nothing to tune on a CPU" in capsys.readouterr().err
