"""Hardware in words."""

from __future__ import annotations

import pytest

from lockstep.errors import OptionError
from lockstep.plan.hardware import GIB, Hardware


def test_gpus_and_host_memory_are_read() -> None:
    eight = Hardware.parse("8xH100-80G,2T-host")
    assert (eight.num_gpus, eight.gpu_name, eight.host_bytes) == (8, "H100", 2048 * GIB)


@pytest.mark.parametrize(
    ("text", "seen_gib"), [("1xH200-141G,128G-host", 139.8), ("1xH100-80G,128G-host", 79.2)], ids=["H200", "H100"]
)
def test_a_gpu_has_what_programs_see_of_it(text: str, seen_gib: float) -> None:
    """`total_memory` of the two cards is 139.8 and 79.2 GiB; the plan may be 0.2 % below, never above by as much."""
    assert Hardware.parse(text).gpu_bytes / GIB == pytest.approx(seen_gib, rel=0.002)


def test_a_machine_may_have_no_gpu() -> None:
    assert Hardware.parse("0.5T-host") == Hardware(0, "", 0, 512 * GIB)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8xH100",
        "8xH100-80G",
        "8xH100-80,2T-host",
        "H100-80G,2T-host",
        "0xH100-80G,2T-host",
        "80G",
        "1xA-1G;1G-host",
    ],
)
def test_other_words_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Hardware.parse(text)
    assert caught.value.field == "--hardware"
    assert caught.value.value == text
    assert "8xH100-80G,2T-host" in caught.value.remedy
    assert "names" in caught.value.reason or "name" in caught.value.reason


def test_this_machine_has_memory() -> None:
    here = Hardware.of_this_machine(with_gpus=False)
    assert here.num_gpus == 0
    assert here.host_bytes > 0
