"""`minigemma batch --engine ray`: Ray Data shares the lines out among actors, on as many machines as the cluster has.

An actor is a process with the model, whose weights are mapped from the file. One that is lost is started again, and Ray
hands its lines out once more. Only this process writes answers, so a run that is killed goes on as any other.
"""

import argparse
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .batch import Answered, Line, answers_of
from .opening import open_model
from .progress import Progress

LINES = 4  # times --parallel: what an actor takes at a time, so that few of its places are empty


class Actor:
    """A model that answers lines, in a process of Ray's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        with Progress(quiet=True) as progress:
            self.model = open_model(args, progress, args.vision)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Lines as JSON to answers as JSON; Ray passes columns of a table."""
        lines = [Line(*json.loads(text)) for text in batch["line"]]
        return {"answer": np.array([json.dumps(each) for each in answers_of(self.model, lines, self.args)])}


def answers_of_cluster(lines: Sequence[Line], args: argparse.Namespace) -> Iterator[Answered]:
    """The answer or error of each line, as the cluster returns them.

    There is an actor for every `--threads` cores of a machine, by default one for each machine. Raises ImportError
    without Ray, ValueError where the cluster cannot be reached, both at once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray.data
    except ImportError as error:
        raise ImportError('--engine ray takes Ray: pip install "minigemma[ray]"') from error
    connect(ray, args.address)
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    threads = args.threads or min((cores for cores in machines if cores), default=1)
    if not (actors := sum(cores // threads for cores in machines)):
        raise ValueError(f"no machine of the cluster has {threads} cores; ask for fewer with -t")
    plain = {name: value for name, value in vars(args).items() if name != "parser"}
    settings = argparse.Namespace(**plain | {"threads": threads, "quiet": True})
    items, blocks = [{"line": json.dumps(line)} for line in lines], -(-len(lines) // (LINES * args.parallel))
    table = ray.data.from_items(items, override_num_blocks=blocks)
    pool = ray.data.ActorPoolStrategy(size=actors)
    found = table.map_batches(Actor, fn_constructor_args=(settings,), batch_size=None, compute=pool, num_cpus=threads)
    return (tuple(json.loads(row["answer"])) for row in found.iter_rows())


def connect(ray: Any, address: str | None) -> None:
    """Join the cluster at an address, or begin one on this machine; Ray ends it with the process."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), 5).close()  # Ray itself would try for two minutes
        ray.init(address=address, **quiet, **({} if address else here))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster at {address or 'this machine'}: {error}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
