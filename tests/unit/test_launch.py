from __future__ import annotations

import pytest

from lockstep.cli import main

RUN = [
    "--hf-checkpoint",
    "/shared/model",
    "--prompt-data",
    "/shared/p.jsonl",
    "--rm-type",
    "math",
    "--num-rollout",
    "2",
]
RUN += ["--n-samples-per-prompt", "2", "--actor-num-nodes", "2", "--actor-num-gpus-per-node", "8"]


def launched(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["launch", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_host_gets_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = launched(capsys, "--hosts", "10.0.0.1,10.0.0.2,10.0.0.3", "--ray-port", "7000", *RUN, "--save", "/shared/s")
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == [
        "ray get-auth-token --generate > /dev/null",
        "scp -r ~/.ray 10.0.0.2:",
        "scp -r ~/.ray 10.0.0.3:",
        "export RAY_AUTH_MODE=token",
        "ray start --head --node-ip-address=10.0.0.1 --port=7000",
        "ray start --address=10.0.0.1:7000 --node-ip-address=10.0.0.2",
        "ray start --address=10.0.0.1:7000 --node-ip-address=10.0.0.3",
        f"lockstep train {' '.join(RUN)} --save /shared/s --ray-address 10.0.0.1:7000",
    ]
    assert any("the same paths: --hf-checkpoint, --save." in line for line in lines)


def test_hosts_to_fill_in_are_as_many_as_the_run_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """Two that train with 8 GPUs each, and two for the 9 copies that sample."""
    lines = launched(capsys, *RUN, "--rollout-num-gpus", "9", "--device", "cpu")
    starts = [line for line in lines if line.startswith("ray start")]
    assert [line.split("--node-ip-address=")[1].split()[0] for line in starts] == ["HOST0", "HOST1", "HOST2", "HOST3"]
    assert all(line.endswith("--num-cpus=8") for line in starts), "CPUs stand in for GPUs"


@pytest.mark.parametrize(
    ("hosts", "words", "says"),
    [
        ("10.0.0.1", [], "fewer than --actor-num-nodes 2"),
        ("192.0.2.77,192.0.2.78", ["--run"], "the first host is not this machine"),
    ],
)
def test_hosts_that_cannot_do_are_refused(
    capsys: pytest.CaptureFixture[str], hosts: str, words: list[str], says: str
) -> None:
    assert main(["launch", "--hosts", hosts, *words, *RUN]) == 2
    error = capsys.readouterr().err
    assert f"--hosts is '{hosts.split(',')[0] if words else hosts}'" in error
    assert says in error
