"""Exit codes: what they are is a promise to schedulers and scripts, and each is spelled once."""

import re
from pathlib import Path

import pytest

from cpt import exit_codes
from cpt.exit_codes import exit_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("found", "told"), [(0, 0), (1, 1), (2, 2), (3, 3), (143, 143), (-15, 3), (-9, 137), (-2, 130)]
)
def test_what_a_signal_killed_never_ends_with_0_nor_with_143_which_promises_a_save(found: int, told: int) -> None:
    assert exit_code(found) == told


def test_the_codes_are_those_that_the_documentation_promises() -> None:
    codes = {name: value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")}
    assert codes == {
        **{"EXIT_DONE": 0, "EXIT_BUG": 1, "EXIT_USER": 2, "EXIT_ENVIRONMENT": 3, "EXIT_GATE": 4},
        "EXIT_STOPPED": 143,
    }


def test_no_other_module_spells_one_of_its_own() -> None:
    assigned = re.compile(r"^[\w, ]*\bEXIT_\w+[\w, ]*(:[^=]*)?=[^=]", re.MULTILINE)
    paths = [path for package in ("cpt", "data_tools", "launch") for path in (ROOT / package).rglob("*.py")]
    found = [path.relative_to(ROOT).as_posix() for path in paths if assigned.search(path.read_text(encoding="utf-8"))]
    assert found == ["cpt/exit_codes.py"]
