"""The environment decides which operators use their kernels."""

import subprocess
import sys

import pytest
import torch

from groundingdino.ops import cpu_library, linear, ms_deform_attn
from groundingdino.runtime.kernels import kernel_mode


@pytest.mark.parametrize(
    ("value", "modes"),
    [
        (None, ("auto", "auto")),
        ("require", ("require", "require")),
        ("off,linear=auto", ("off", "auto")),
        ("linear=off", ("auto", "off")),
        (" linear=off , require", ("require", "off")),
    ],
)
def test_one_word_is_for_all_operators_and_one_may_differ(value, modes, monkeypatch):
    monkeypatch.delenv("GROUNDINGDINO_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("GROUNDINGDINO_KERNELS", value)
    assert (kernel_mode("ms_deform_attn"), kernel_mode("linear")) == modes


@pytest.mark.parametrize("value", ["on", "matmul=off", "linear=on", "off,,auto"])
def test_a_word_or_an_operator_that_does_not_exist_is_refused_in_one_line(value, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", value)
    with pytest.raises(ValueError, match=f"GROUNDINGDINO_KERNELS='{value}': .*operators are ms_deform_attn") as refusal:
        kernel_mode("linear")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("old", "modes"), [("auto", "auto auto"), ("aclnn", "require auto"), ("composite", "off off")])
def test_the_old_variable_still_works_and_says_once_what_it_is_now(old, modes):
    program = (
        "from groundingdino.runtime.kernels import kernel_mode as mode\n"
        "print(*(mode(name) for _ in range(2) for name in ('ms_deform_attn', 'linear')))"
    )
    command = [sys.executable, "-c", f"import os; os.environ['GROUNDINGDINO_MSDA'] = {old!r}\n{program}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{modes} {modes}"
    assert result.stderr.count(f"GROUNDINGDINO_MSDA={old} is now GROUNDINGDINO_KERNELS=") == 1


def test_the_new_variable_wins_over_the_old_one(monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_MSDA", "composite")
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "auto")
    assert kernel_mode("linear") == "auto"


def test_a_kernel_that_is_required_and_not_built_is_an_error(monkeypatch):
    monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [])
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "require")
    cpu_library.library.cache_clear()
    locations, weights = torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)
    try:
        with (
            pytest.warns(UserWarning, match="kernels are not built"),
            pytest.raises(RuntimeError, match=r"requires the kernel of ms_deform_attn.*pip install"),
        ):
            ms_deform_attn(torch.randn(1, 6, 1, 4), [(2, 3)], locations, weights)
        with pytest.raises(RuntimeError, match="requires the kernel of linear"):
            linear(torch.randn(512, 256), torch.randn(256, 256), None)
    finally:
        cpu_library.library.cache_clear()
