"""One server of several nodes, all of them on this machine: a launcher a node, as on hosts of their own.

With one rank a node, a layout of more ranks than this host has GPUs still runs on real GPUs over real NCCL: several
nodes share a GPU and take turns on it. NCCL refuses two ranks on one GPU of one host; with a host id a node it takes
them for hosts, and connects them through sockets. That is right, and slow: it says nothing about speed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
from layouts.hosts import Host

from sglang_minimax.comparison import Answer
from sglang_minimax.ports import free_port, port_flags
from sglang_minimax.server_process import Server, ServerError, SessionProcess

_POLL_SECONDS = 0.2
_LAUNCH_SECONDS = 120
_ANSWER_SECONDS = 240

ON_GPUS = [
    "--attention-backend", "triton", "--grammar-backend", "none", "--cuda-graph-bs", "1", "2", "4", "8",
    "--mem-fraction-static", "0.7",
]  # fmt: skip
"""Flags of a server on GPUs that others may be on too."""

# Free memory differs between GPUs where other ranks come and go, which the engine takes for a fault.
BESIDE_OTHERS = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}


class _Running:
    """The launchers that this process started and has not ended yet, in whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._launchers: set[SessionProcess] = set()
        self._ending = False

    @contextlib.contextmanager
    def start(self, launcher: Callable[[], StartedT]) -> Iterator[StartedT]:
        """What ``launcher`` makes, until its end.

        Raises:
            ServerError: all are being ended.
        """
        with self._lock:
            if self._ending:
                raise ServerError("no more servers are started: this process was told to end")
            started = launcher()
            self._launchers.add(started)
        try:
            with started:
                yield started
        finally:
            with self._lock:
                self._launchers.remove(started)

    def end(self) -> None:
        """Asks every launcher to end, and lets none start; the threads that wait for them clear up behind them."""
        with self._lock:
            self._ending = True
            for launcher in self._launchers:
                launcher.ask_to_end()


StartedT = TypeVar("StartedT", bound=SessionProcess)
_RUNNING = _Running()
end_servers = _RUNNING.end


class Nodes:
    """The nodes of one server. Node 0 answers; the server has ended as soon as one of them has.

    Args:
        host: that of node 0, where it has one of its own.
    """

    def __init__(self, first: Server, others: list[SessionProcess], host: Host | None = None) -> None:
        self._first = first
        self._others = others
        self._host = host

    def launchers(self) -> list[SessionProcess]:
        return [self._first, *self._others]

    def wait_until_ready(self, timeout_seconds: float) -> None:
        self._unless_one_ends(lambda: self._first.wait_until_ready(timeout_seconds, on_progress=lambda _: None))

    def post(self, path: str, body: dict[str, Any], *, timeout_seconds: float) -> Any:
        return self._unless_one_ends(lambda: self._first.post(path, body, timeout_seconds=timeout_seconds))

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> list[dict[str, Any]]:
        """The ``meta_info`` of each prompt's ``steps`` greedy tokens, their log-probabilities in it."""
        sampling = {"temperature": 0, "max_new_tokens": steps, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
        return [reply["meta_info"] for reply in self.post("/generate", body, timeout_seconds=_ANSWER_SECONDS)]

    def _unless_one_ends(self, call: Callable[[], Any]) -> Any:
        """The result of ``call``, which waits for node 0 and would not notice that another one is gone.

        Raises:
            ServerError: a node has ended. ``call`` is then made to end as well, by ending node 0.
        """
        with ThreadPoolExecutor(1, initializer=self._host and self._host.enter_network) as pool:
            result = pool.submit(call)
            try:
                while not result.done():
                    for rank, node in enumerate(self._others, start=1):
                        if node.has_ended():
                            raise ServerError(f"node {rank} has ended; its log is {node.log}")
                    time.sleep(_POLL_SECONDS)
            except BaseException:  # a signal too; the pool waits for its thread, and that for node 0
                self._first.stop()
                raise
            return result.result()


def answer_of(prompt: Sequence[int], meta_info: Mapping[str, Any]) -> Answer:
    """What :meth:`Nodes.generate` gave for ``prompt``."""
    steps = meta_info["output_token_logprobs"]
    return Answer(str(prompt), "", [token for _, token, *_ in steps], [logprob for logprob, *_ in steps])


@contextlib.contextmanager
def serve_on_nodes(
    command: list[str],
    number: int,
    logs: list[Path],
    environment_of: Callable[[int], Mapping],
    hosts: Sequence[Host] | None = None,
) -> Iterator[Nodes]:
    """Starts ``command`` once a node with what tells the nodes apart, and ends all of them.

    Args:
        command: the server's, without a port and without nodes.
        number: of nodes.
        logs: a file a node.
        environment_of: what to add to the environment of a node, by its rank.
        hosts: of the nodes, where each has its own.
    """

    def words(rank: int, port: int) -> list[str]:
        variables = [f"{name}={value}" for name, value in environment_of(rank).items()]
        words = ["env", *variables, *command, *port_flags(port), *_node(rank)]
        return hosts[rank].command(words) if hosts else words

    def _node(rank: int) -> Iterator[str]:
        if number > 1:
            yield from ("--nnodes", str(number), "--node-rank", str(rank))
            yield from ("--dist-init-addr", f"{hosts[0].address if hosts else '127.0.0.1'}:{meeting_port}")

    meeting_port = free_port()
    with contextlib.ExitStack() as running:
        others = [
            running.enter_context(_RUNNING.start(partial(SessionProcess, words(rank, free_port()), logs[rank])))
            for rank in range(1, number)
        ]
        # Under DP attention every node makes sure that the ports behind the meeting port are free on its host, and
        # node 0 takes them. Where that is one host, node 0 starts last.
        for node in others if "--enable-dp-attention" in command and not hosts else ():
            _wait_until_it_starts_ranks(node)
        port = free_port()
        first = running.enter_context(_RUNNING.start(partial(Server, words(0, port), logs[0], port=port)))
        yield Nodes(first, others, hosts[0] if hosts else None)


def _wait_until_it_starts_ranks(node: SessionProcess) -> None:
    deadline = time.monotonic() + _LAUNCH_SECONDS
    while not any(_name_of(process).startswith("sglang::") for process in node.members()):
        if node.has_ended():
            raise ServerError(f"a node ended before it started its ranks; its log is {node.log}")
        if time.monotonic() > deadline:
            raise ServerError(f"a node started no rank in {_LAUNCH_SECONDS} s; its log is {node.log}")
        time.sleep(_POLL_SECONDS)


def _name_of(process: psutil.Process) -> str:
    """The title that the engine gives its processes, or what the program is called."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name())
    return ""


def shared_gpu_environment(rank: int, num_gpus: int, ranks_per_node: int = 1) -> dict[str, str]:
    """For node ``rank``, whose ranks each have a GPU of their own and share it with other nodes'.

    The engine's own all-reduce, which is for the ranks of one host, must be off."""
    gpus = [(rank * ranks_per_node + place) % num_gpus for place in range(ranks_per_node)]
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        "NCCL_HOSTID": f"node{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
