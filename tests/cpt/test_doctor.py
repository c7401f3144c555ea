"""`cpt doctor`: a table or JSON, an exit code that says who can fix it, and no torch where there is no GPU."""

import json
import subprocess
import sys
from typing import Any

import pytest

from cpt.doctor_cli import attention_check


def test_the_table_and_the_json_tell_the_same(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.root)
    table, told = workshop.cpt("doctor"), workshop.cpt("doctor", "--json")
    assert table.code == told.code == 0, table.text
    checks = json.loads(told.out)["checks"]
    assert all(check["name"] in table.out for check in checks)
    assert f"{sum(check['status'] == 'pass' for check in checks)} pass" in table.out


def test_a_run_file_with_a_store_that_is_missing_ends_with_2(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.root)
    stores = workshop.stores()
    run_file = workshop.run_file("r")
    assert workshop.cpt("doctor", run_file, "train.peak_lr=1e-3").code == 0
    (stores["code"] / "heldout" / "manifest.json").unlink()
    done = workshop.cpt("doctor", run_file)
    assert done.code == 2 and "manifest.json" in done.out
    done = workshop.cpt("doctor", run_file, "train.peak_lr=fast")
    assert done.code == 2 and "train.peak_lr" in done.err


def test_without_gpus_torch_is_not_imported(workshop: Any) -> None:
    program = "import sys; sys.argv = ['cpt', 'doctor', '--json']\ntry:\n    from cpt.cli import main; main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules, file=sys.stderr)"
    environment = {"PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=workshop.root, env=environment
    )
    told = json.loads(done.stdout)
    if told["details"]["facts"]["gpus"]:
        pytest.skip("this machine has GPUs")
    assert done.stderr.strip() == "False"


def test_a_cpu_has_one_back_end_and_torch_that_sees_no_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    assert "sdpa" in attention_check(has_gpus=False).found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention_check(has_gpus=True).status == "fail"


def test_with_a_gpu_the_fastest_back_end_that_can_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from cpt.model import kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        kernels, "resolve_backend", lambda *_, **__: kernels.Choice("varlen", "flash_attn: not installed")
    )
    assert attention_check(has_gpus=True).found == "auto is varlen (passed over flash_attn: not installed)"
