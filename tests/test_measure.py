"""Progress and memory errors as a log shows them."""

import io

import pytest
import torch

from nsa import measure
from nsa.measure import Progress, refused_allocation, time_ms


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_plain_lines_no_more_often_than_asked_and_the_last_one():
    log = io.StringIO()
    with Progress("prefill", 30, "tokens", every=3600, stream=log) as progress:
        for _ in range(3):
            progress.advance(10)
    assert log.getvalue() == "prefill: 30/30 tokens, 0 s\n"


def test_a_slow_run_is_heard_of_before_its_end():
    log = io.StringIO()
    with Progress("prefill", 20, "tokens", every=0, stream=log) as progress:
        progress.advance(10)
    assert log.getvalue() == "prefill: 10/20 tokens, 0 s\n"


def test_a_terminal_gets_a_bar():
    pytest.importorskip("tqdm", reason="the bar is tqdm's")
    terminal = Terminal()
    with Progress("prefill", 20, "tokens", stream=terminal) as progress:
        progress.advance(20)
    assert "\r" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()


def test_a_refused_allocation_is_told_in_gib():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)
    assert refused_allocation(refused.value) == "1048576.00 GiB"


def test_a_size_beyond_64_bits_is_a_refused_allocation():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**40, 2**40)
    assert refused_allocation(refused.value) == "more bytes than 64 bits can count"


def test_the_words_of_a_cuda_refusal_are_kept():
    assert refused_allocation(RuntimeError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0")) == "20.50 GiB"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("tile")])
def test_another_error_is_not_taken_for_one_of_memory(error):
    assert refused_allocation(error) is None


def test_time_is_in_milliseconds():
    assert 0 < time_ms(lambda: None, torch.device("cpu")) < 1000


def test_clocks_are_nvmls_for_the_sm_and_the_memory(monkeypatch):
    class Nvml:
        def nvmlDeviceGetClockInfo(self, card, clock, out):
            out._obj.value = {1: 1980, 2: 3201}[clock]  # NVML_CLOCK_SM, NVML_CLOCK_MEM
            return 0

    class Card:
        uuid = "0-1"

    found = {"0-1": (Nvml(), None)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(measure, "_nvml_device", found.get)
    assert measure.clocks(torch.device("cuda")) == (1980, 3201)
    found["0-1"] = None  # a machine whose driver has no NVML
    assert measure.clocks(torch.device("cuda")) is None
    assert measure.clocks(torch.device("cpu")) is None
