"""Signals become a flag that all ranks agree on, and a loss that is not a number is refused by name."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from cpt.train.guard import STOP_SIGNALS, NonFiniteError, StopFlag, check_finite


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = StopFlag()
    flag.install()
    yield flag
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_real_signal_raises_the_flag_and_does_not_end_the_process(flag: StopFlag, number: signal.Signals) -> None:
    assert not flag.is_raised
    os.kill(os.getpid(), number)
    assert flag.is_raised and flag.signal_name == number.name


def test_repeats_of_a_signal_are_one_request(flag: StopFlag) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # what a launcher sends within a second
        os.kill(os.getpid(), number)
    assert flag.signal_name == "SIGINT"


def test_a_signal_after_the_grace_time_kills_as_usual(flag: StopFlag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopFlag, "GRACE_SECONDS", -1.0)
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_process_agrees_with_itself(flag: StopFlag) -> None:
    assert flag.agreed(torch.device("cpu")) is False
    flag._raise_flag(signal.SIGTERM, None)
    assert flag.agreed(torch.device("cpu")) is True


def test_finite_losses_pass() -> None:
    check_finite([("general", 3.0), ("medical", 0.0)], step=1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_refused_with_its_source_and_step(loss: float) -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 7: the loss of medical is not finite; the weights were not updated"
    ):
        check_finite([("the loss of general", 3.0), ("the loss of medical", loss)], step=7)


def test_every_bad_source_is_named() -> None:
    with pytest.raises(NonFiniteError, match="general, medical"):
        check_finite(iter([("general", float("nan")), ("law", 1.0), ("medical", float("inf"))]), step=1)
