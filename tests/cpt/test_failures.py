"""Every exception has an exit code and something to print; what a person can fix comes without a traceback."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.checkpoint.portable import Checkpoint
from cpt.config import ConfigError, Problem, read_mapping
from cpt.failures import explain
from cpt.rundir import DataError, write_atomic
from cpt.train.guard import check_finite


def caught(action: Callable[[], object]) -> tuple[int, str]:
    try:
        action()
    except Exception as error:
        return explain(error)
    raise AssertionError("nothing was raised")


def test_what_the_user_can_fix_ends_with_2_and_shows_the_message_alone(tmp_path: Path) -> None:
    code, message = caught(lambda: read_mapping(tmp_path / "run.yaml"))
    assert code == 2 and message == f"configuration error:\n  - {tmp_path / 'run.yaml'}: no such file"
    code, message = caught(lambda: Checkpoint.open(tmp_path / "gone"))
    assert code == 2 and message == f"data error: {tmp_path / 'gone'}: no such checkpoint folder"


def test_the_environment_ends_with_3_and_our_own_message_stands_alone(tmp_path: Path) -> None:
    code, message = caught(lambda: write_atomic(tmp_path / "nowhere" / "file", ""))
    assert code == 3 and message.startswith("environment error:") and "Traceback" not in message
    code, message = caught(lambda: check_finite([("a", float("nan"))], step=1))
    assert code == 3 and message.startswith("environment error: step 1") and "Traceback" not in message


def test_a_runtime_error_from_a_library_ends_with_3_and_keeps_its_traceback() -> None:
    def library() -> None:
        raise RuntimeError("CUDA out of memory")  # raised in this file, which is no part of the product

    code, message = caught(library)
    assert code == 3 and "Traceback" in message and "CUDA out of memory" in message


@pytest.mark.parametrize(
    "error", [AssertionError("our bug"), KeyError("x"), ValueError("x"), TypeError("x"), ZeroDivisionError()]
)
def test_anything_else_is_our_bug_and_ends_with_1_and_a_traceback(error: Exception) -> None:
    def broken() -> None:
        raise error

    code, message = caught(broken)
    assert code == 1 and "Traceback" in message and "bug in cpt" in message


def test_an_error_that_was_never_raised_can_be_explained_too() -> None:
    assert explain(RuntimeError("kept for later"))[0] == 3


def test_no_explanation_is_ever_0_or_empty() -> None:
    problem = Problem("train.tokens", 3, "is too small")
    for error in (ConfigError(problem), DataError("x"), OSError("x"), RuntimeError("x"), Exception(), MemoryError()):
        code, message = explain(error)
        assert code in (1, 2, 3) and message.strip()


def test_importing_it_needs_no_torch() -> None:
    program = "import cpt.failures, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).resolve().parents[2], check=True)
