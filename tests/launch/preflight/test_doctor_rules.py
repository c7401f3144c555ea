"""What one machine needs: every row of `cpt doctor` passes where it should, and names the fix where it does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import doctor
from launch.preflight.checks import Check
from launch.preflight.doctor import (
    compiler_check,
    environment_check,
    examine,
    extras_check,
    gpu_check,
    launchers_check,
    packages_check,
    python_check,
    runs_check,
    stated_requirements,
    torch_check,
)

Describe = Callable[..., dict[str, Any]]


def test_this_machine_is_looked_at_row_by_row(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.root)
    report = examine(attention=lambda has_gpus: Check("attention", "pass", f"GPUs: {has_gpus}"))
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names) and {"Python", "packages", "torch", "attention", "disk"} <= set(names)
    assert report.ok, report.failed
    assert all(check.fix for check in report.checks if check.status != "pass")
    assert not any(check.hosts for check in report.checks), "there is one machine: its values stand in the text"


def test_a_run_file_adds_what_the_run_needs_here(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.root)
    stores = workshop.stores()
    run_file = str(workshop.run_file("r"))
    assert {"run folder", "stores", "weights"} <= {check.name for check in examine([run_file]).checks}
    (stores["code"] / "train" / "manifest.json").unlink()
    report = examine([run_file])
    assert report.exit_code == 2 and [check.name for check in report.failed] == ["stores"]
    assert "code" in report.failed[0].found


def test_an_old_python_fails() -> None:
    assert python_check((3, 10, 9)).status == "fail" and python_check((3, 13, 0)).status == "pass"


def test_packages_are_held_against_the_ranges_that_cpt_states() -> None:
    assert packages_check(["typer>=0.1", "absent-package; extra == 'x'"]).status == "pass"
    found = packages_check(["typer>=99", "absent-package>=1"])
    assert found.status == "fail" and "absent-package is missing" in found.found
    assert found.fix == "pip install 'typer>=99' 'absent-package>=1'"


def test_a_checkout_that_is_not_installed_still_needs_its_heart() -> None:
    assert "torch" in stated_requirements("no-such-distribution")
    assert any(line.startswith("typer") for line in stated_requirements("cpt"))


def test_optional_packages_are_missed_on_a_gpu_only() -> None:
    wanted = ["typer>=0.1", "absent-kernel>=1; extra == 'flash'", "absent-reader; extra == 'data'"]
    wanted += ["absent-harness; extra == 'eval'"]
    on_cpu, on_gpu = (extras_check(wanted, has_gpus=has_gpus) for has_gpus in (False, True))
    assert on_cpu.status == "pass" and "flash: absent-kernel; data: absent-reader; eval: absent-harness" in on_cpu.found
    assert on_gpu.status == "warn" and "pip install 'cpt[flash]'" in on_gpu.fix
    assert extras_check(["typer; extra == 'data'"], has_gpus=True).found == "all there"


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [("12.8", "570.1", "pass"), ("13.0", "570.1", "fail"), (None, "570.1", "fail"), ("12.8", "[N/A]", "pass")],
)
def test_torch_must_be_built_for_gpus_that_are_there_and_for_their_driver(
    cuda: str | None, driver: str, status: str, describe: Describe
) -> None:
    facts = describe(gpus=1)
    facts["versions"]["cuda"], facts["gpus"][0]["driver_version"] = cuda, driver
    found = torch_check(facts)
    assert found.status == status and bool(found.fix) == (status == "fail")


def test_a_machine_without_gpus_is_well_unless_torch_expects_them(describe: Describe) -> None:
    facts = describe()
    assert (torch_check(facts).status, gpu_check(facts).status) == ("pass", "pass")
    facts["versions"]["cuda"] = "12.8"
    assert (torch_check(facts).status, gpu_check(facts).status) == ("pass", "warn")
    assert gpu_check(describe(gpu_error="NVML: Unknown Error")).status == "fail"
    assert gpu_check(describe(gpus=2)).found == "2 x NVIDIA H200 140 GiB"
    facts["versions"]["torch"] = None
    assert torch_check(facts).status == "fail"


def test_a_compiler_is_needed_where_the_run_needs_it() -> None:
    assert compiler_check([], wanted=True).status == "pass"
    assert compiler_check(["g++"], wanted=False).status == "pass"
    found = compiler_check(["libaio.h (libaio-dev)"], wanted=True)
    assert found.status == "fail" and "libaio" in found.found and "offload=cpu" in found.fix


def test_a_folder_that_cannot_be_written_to_or_has_no_room_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs_check(Path("/proc/runs")).status == "fail"
    for free, status in ((1e8, "fail"), (5e9, "warn"), (1e12, "pass")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder, free=free: type("Usage", (), {"free": free}))
        assert runs_check(tmp_path / "runs").status == status


def test_what_starts_jobs_elsewhere_is_told_and_pdsh_is_missed_beside_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "openssh-client" in launchers_check({}).fix
    found = launchers_check({"ssh": "/usr/bin/ssh", "pdsh": None})
    assert found.status == "warn" and "pdsh" in found.fix
    found = launchers_check({"ssh": "/usr/bin/ssh", "pdsh": "/usr/bin/pdsh"})
    assert found.status == "pass" and "several hosts" in found.found


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "every kernel is waited for"),
        ({"NCCL_P2P_DISABLE": "1"}, "host's memory"),
        ({"NCCL_DEBUG": "info"}, "floods"),
        ({"OMP_NUM_THREADS": "64"}, "more threads than the 8 CPUs"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "hides the GPUs"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "wait for the other ranks"),
    ],
)
def test_a_variable_that_hurts_is_named_with_the_line_that_ends_it(variables: dict[str, str], told: str) -> None:
    found = environment_check(variables, num_gpus=1, cpus=8)
    assert found.status == "warn" and told in found.found
    assert found.fix.startswith("unset ") and set(variables) <= set(found.fix.split())


def test_variables_that_change_nothing_are_let_be() -> None:
    calm = {"CUDA_LAUNCH_BLOCKING": "0", "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "8", "RANK": "0", "SECRET": "x"}
    assert environment_check(calm, num_gpus=1, cpus=8).status == "pass"
    assert environment_check({"CUDA_VISIBLE_DEVICES": ""}, num_gpus=0, cpus=8).status == "pass"
