"""`lockstep launch`: the commands that bring up a Ray cluster for a run, host by host, or their execution.

Hosts are brought up by whoever may log in there: this command starts nodes on this machine alone, and ends only those.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lockstep.config import Config
from lockstep.errors import OptionError, RankError

_JOIN_S = 600.0
"""What hosts get to join, as somebody has to log in there."""
_END_S = 30.0
_RAY = str(Path(sys.executable).with_name("ray"))
_COUNT = "import json, ray; ray.init(address={!r}, logging_level='ERROR'); print(json.dumps(len(ray.nodes())))"


def launch(config: Config, hosts: Sequence[str], port: int, train_words: Sequence[str], *, starts: bool) -> int:
    """Print the commands, or do what can be done from here.

    Args:
        hosts: all of them, this machine first; none for names to fill in.
        train_words: the command line of `lockstep train`.
    """
    hosts = hosts_of(config, hosts)
    if starts:
        return run_here(config, hosts, port, train_words)
    print(explain(config, hosts, port, train_words), end="")
    return 0


def hosts_of(config: Config, given: Sequence[str]) -> list[str]:
    """The hosts of a run, the controller's first; names to fill in where none are given.

    Raises:
        OptionError: there are fewer than machines that train.
    """
    cluster = config.cluster
    if given:
        if len(given) < cluster.actor_num_nodes:
            raise OptionError(
                "--hosts",
                " ".join(given),
                f"these are fewer than --actor-num-nodes {cluster.actor_num_nodes}.",
                "Name every host of the run, the one that you are on first.",
            )
        return list(given)
    replicas = cluster.rollout_num_gpus or 0
    count = cluster.actor_num_nodes + -(-replicas // cluster.actor_num_gpus_per_node)
    return [f"HOST{number}" for number in range(count)]


def start_commands(config: Config, hosts: Sequence[str], port: int) -> list[list[str]]:
    """`ray start` of every host, in their order. Ray counts GPUs itself; CPUs that stand in for them it is told."""
    head = f"{hosts[0]}:{port}"
    room = [f"--num-cpus={config.cluster.actor_num_gpus_per_node}"] if config.cluster.device == "cpu" else []
    commands = [["ray", "start", "--head", f"--node-ip-address={hosts[0]}", f"--port={port}", *room]]
    for host in hosts[1:]:
        commands.append(["ray", "start", f"--address={head}", f"--node-ip-address={host}", *room])
    return commands


def explain(config: Config, hosts: Sequence[str], port: int, train_words: Sequence[str]) -> str:
    """All commands with what they are for, as a text to follow and to paste from."""
    head, *others = hosts
    train = shlex.join(["lockstep", "train", *train_words, "--ray-address", f"{head}:{port}"])
    shared = ", ".join(flag for flag, value in _shared(config) if value)
    commands = [shlex.join(command) for command in start_commands(config, hosts, port)]
    lines = [
        f"# {len(hosts)} hosts: {head} runs the controller. Every host needs the same Python environment at the same",
        f"# place, with Lockstep and Ray, and the same paths: {shared}. All ports between them must be open.",
        "",
        f"# 1. A secret that all nodes share. On {head}:",
        "ray get-auth-token --generate > /dev/null",
    ]
    lines += [f"scp -r ~/.ray {host}:" for host in others]
    lines += ["", "#    On every host, in the shell that runs the commands below:", "export RAY_AUTH_MODE=token"]
    lines += ["", f"# 2. Ray's head. On {head}:", commands[0]]
    for host, command in zip(others, commands[1:], strict=True):
        lines += ["", f"# 3. A node that joins it. On {host}:", command]
    lines += [
        "",
        f"# 4. The run. On {head}, once `ray status` lists {len(hosts)} nodes:",
        train,
        "#    Or leave it to Ray's job server, which outlives your terminal (needs ray[default]):",
        f"#    {shlex.join(['ray', 'job', 'submit', '--address', f'http://{head}:8265', '--no-wait', '--', train])}",
        "",
        "# 5. Afterwards, on every host, if no other Ray runs there: `ray stop` ends all Ray processes of a machine.",
    ]
    return "\n".join(lines) + "\n"


def run_here(config: Config, hosts: Sequence[str], port: int, train_words: Sequence[str]) -> int:
    """Start the nodes that are on this machine, wait for the others, train, and end what was started.

    Returns the exit code of the training.
    """
    address = f"{hosts[0]}:{port}"
    commands = start_commands(config, hosts, port)
    if not _is_here(hosts[0]):
        raise OptionError("--hosts", hosts[0], "the first host is not this machine.", "Run this command there.")
    os.environ["RAY_AUTH_MODE"] = "token"
    subprocess.run([_RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    with ExitStack() as stack:
        for host, command in zip(hosts, commands, strict=True):
            if _is_here(host):
                print(f"starting Ray on {host}", file=sys.stderr, flush=True)
                stack.enter_context(_node(command, host))
                _wait_for_nodes(address, 1)
            else:
                print(f"on {host}, start: {shlex.join(command)}", file=sys.stderr, flush=True)
        _wait_for_nodes(address, len(hosts))
        train = [sys.executable, "-m", "lockstep", "train", *train_words, "--ray-address", address]
        return subprocess.run(train, check=False).returncode


@contextmanager
def _node(command: list[str], host: str) -> Iterator[None]:
    """A Ray node as a child of this process, which takes its own processes along when it is ended."""
    process = subprocess.Popen([_RAY, *command[1:], "--block"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)
        if (code := process.poll()) is not None:
            raise RankError(
                f"Ray on {host}",
                f"ended with exit code {code}",
                "it did not start.",
                f"Try by hand: {shlex.join(command)}",
            )
        yield
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_nodes(address: str, count: int) -> None:
    deadline = time.monotonic() + _JOIN_S
    while True:
        asked = subprocess.run(
            [sys.executable, "-c", _COUNT.format(address)], check=False, capture_output=True, text=True
        )
        found = int(json.loads(asked.stdout.splitlines()[-1])) if asked.returncode == 0 else 0
        if found >= count:
            return
        if time.monotonic() > deadline:
            raise RankError(
                f"Ray at {address}",
                f"{found} of {count} nodes",
                f"the others did not join within {_JOIN_S:.0f} s.",
                "Run the commands above on their hosts; they need the head's ~/.ray/auth_token and open ports.",
            )
        time.sleep(1.0)


def _is_here(host: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        with socket.create_server((host, 0)):
            return True
    except OSError:
        return False


def _shared(config: Config) -> Iterator[tuple[str, object]]:
    yield "--hf-checkpoint", config.model.hf_checkpoint
    yield "--ref-load", config.checkpoint.ref_load
    yield "--save", config.checkpoint.save
    yield "--save-hf", config.checkpoint.save_hf
