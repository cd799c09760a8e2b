"""What a report says of a machine, and what it keeps to itself."""

from pathlib import Path

import pytest

from groundingdino.runtime import environment


def test_driver_firmware_toolkit_and_numa_nodes_are_read_from_their_files(tmp_path: Path, monkeypatch):
    files = {
        "usr/local/Ascend/driver/version.info": "Version=25.2.0\nascendhal_version=7.35\n",
        "usr/local/Ascend/firmware/version.info": "Version=7.7.0.6\n",
        "opt/cann/aarch64-linux/ascend_toolkit_install.info": "package_name=x\nversion=8.5.0\n",
        "sys/devices/system/node/node0/cpulist": "0-23\n",
        "sys/devices/system/node/node1/cpulist": "24-47\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    found = environment.describe(tmp_path)
    assert (found["driver"], found["firmware"], found["toolkit"]) == ("25.2.0", "7.7.0.6", "8.5.0")
    assert found["numa"] == {"node0": "0-23", "node1": "24-47"}
    assert found["variables"]["HCCL_CONNECT_TIMEOUT"] == "600"


def test_values_that_work_are_not_warned_about():
    fine = {"HCCL_CONNECT_TIMEOUT": "600", "HCCL_EXEC_TIMEOUT": "3600", "HCCL_EVENT_TIMEOUT": "3700"}
    assert environment.hccl_problems({**fine, "HCCL_SOCKET_IFNAME": "eth0", "HCCL_IF_BASE_PORT": "21000"}, 2) == []
    assert environment.hccl_problems({}, 2) == []


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "120 to 7200"),
        ({"HCCL_CONNECT_TIMEOUT": "ten"}, "no whole number"),
        ({"HCCL_EXEC_TIMEOUT": "3600", "HCCL_EVENT_TIMEOUT": "1900"}, "longer than HCCL_EXEC_TIMEOUT=3600"),
        ({"HCCL_EVENT_TIMEOUT": "1800"}, "longer than HCCL_EXEC_TIMEOUT=1836"),
        ({"HCCL_IF_BASE_PORT": "65530"}, "at most 65520"),
        ({"HCCL_WHITELIST_DISABLE": "0"}, "without HCCL_WHITELIST_FILE"),
        ({"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "1"}, "exclude each other"),
        ({"HCCL_SOCKET_IFNAME": "=lo"}, "reaches no other host"),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, "waits for every operator"),
    ],
)
def test_values_that_break_a_run_are_named(variables, word):
    (problem,) = environment.hccl_problems(variables, 2)
    assert word in problem


def test_private_words_go_and_versions_and_parts_of_words_stay():
    words = {"/srv/anna/work": "WORKDIR", "node17": "HOST", "anna": "USER"}
    text = "anna@mail.example.org ran /srv/anna/work/train.py on node17 (10.2.3.4), /home/bert/x; hannah, "
    text += "driver 25.2.0.1.7"
    hidden = environment.without(words, text)
    assert hidden == "ADDRESS ran WORKDIR/train.py on HOST (ADDRESS), /home/USER/x; hannah, driver 25.2.0.1.7"
