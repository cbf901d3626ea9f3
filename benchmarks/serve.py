"""`python -m benchmarks.serve [--minutes N]`: what a client of `minigemma serve` waits for, and a soak.

First, in turns: one client alone, 16 clients at once, and `generate_batch` of the same prompts in a process of its own
kind. Then, for N minutes, 16 clients that ask, leave in the middle, send what is no JSON or too much of it, close half
of their connection, or ask for what there is not. All of it on the loopback interface, against a server that this
program starts and ends.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import minigemma as mg

CLIENTS = 16
TOKENS = 64
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
TEXT = """the a red old small bird fox mill river house morning child ran saw met said near under with and then"""
WORDS = TEXT.split()


class Served:
    """`minigemma serve` as a process."""

    def __init__(self, model: str, flags: list[str]) -> None:
        command = [sys.executable, "-m", "minigemma", "serve", "-m", model, "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        told = ""
        for line in self.process.stderr:
            told += line
            if "serving http://" in line:
                self.port = int(line.split("127.0.0.1:")[1].split("/")[0])
                return
        raise RuntimeError(f"the server did not start: {told}")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    @property
    def memory(self) -> float:
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of a whole answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", "/v1/completions", body)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, content

    def stream(self, body: dict[str, Any], most: int = 10**9) -> list[float]:
        """The seconds until each chunk of a stream, from the first byte sent; leaves after `most` of them."""
        connection, began = HTTPConnection("127.0.0.1", self.port, timeout=300), time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
        reply, times = connection.getresponse(), list[float]()
        while reply.status == 200 and len(times) < most and (line := reply.readline()):
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - began)
        reply.close()
        connection.close()
        return times


def prompt_of(chance: random.Random) -> str:
    """A text of 5 to 60 words, every third with a beginning that others have too."""
    text = "Once upon a time there was a small fox near the old mill. " if chance.random() < 0.3 else ""
    return text + " ".join(chance.choices(WORDS, k=chance.randint(5, 60)))


def request_of(chance: random.Random) -> dict[str, Any]:
    """A completion that is drawn by its own seed."""
    return {"prompt": prompt_of(chance), "max_tokens": TOKENS, "temperature": 1.0, "seed": chance.randrange(10**6)}


def percentiles(values: list[float]) -> str:
    """Median and 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
    return f"{1000 * statistics.median(values):8.1f} {1000 * cuts[98]:8.1f}"


# ---- speed


def at_once(served: Served, bodies: list[dict[str, Any]]) -> tuple[list[list[float]], float]:
    """The times of streams that begin together, and the seconds until all have ended."""
    found, began = list[list[float]](), time.perf_counter()
    threads = [threading.Thread(target=lambda body: found.append(served.stream(body)), args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - began


def measure(served: Served, model: str, threads: int | None, rounds: int) -> None:
    """Print what one client and 16 wait for, and the tokens per second of all beside those of `generate_batch`."""
    loaded, chance = mg.load(model, threads=threads), random.Random(1)
    one, many, speeds, batch = list[list[float]](), list[list[float]](), list[float](), list[float]()
    for _ in range(rounds + 1):
        bodies = [request_of(chance) for _ in range(CLIENTS)]
        alone, _ = at_once(served, bodies[:1])
        times, seconds = at_once(served, bodies)
        began = time.perf_counter()
        settings = {"max_new_tokens": TOKENS, "temperature": 1.0, "seed": [body["seed"] for body in bodies]}
        tokens = sum(1 for _ in mg.generate_batch(loaded, [body["prompt"] for body in bodies], raw=True, **settings))
        one += alone
        many += times
        speeds.append(tokens / seconds)
        batch.append(tokens / (time.perf_counter() - began))
    print(f"{'':24}{'first token, ms':>18}{'gaps, ms':>18}\n{'':24}{'median':>9}{'99 %':>9}{'median':>9}{'99 %':>9}")
    for name, streams in (("one client", one[1:]), (f"{CLIENTS} clients", many[CLIENTS:])):
        gaps = [b - a for times in streams for a, b in pairwise(times)]
        print(f"{name:24} {percentiles([times[0] for times in streams])} {percentiles(gaps)}")
    ratios = [served / alone for served, alone in zip(speeds[1:], batch[1:], strict=True)]
    print(f"tokens/s of {CLIENTS} clients: {statistics.median(speeds[1:]):,.0f}; generate_batch: ", end="")
    print(f"{statistics.median(batch[1:]):,.0f}; ratio {statistics.median(ratios):.2f}", flush=True)


# ---- soak


def fate(served: Served, chance: random.Random) -> str:
    """One request of a client of some kind; says what became of it, "lost" for one that was not answered."""
    body = request_of(chance) | {"max_tokens": chance.randint(1, TOKENS)}
    match chance.choice(["whole", "stream", "stream", "leave", "no JSON", "too large", "half-closed", "gone", "wrong"]):
        case "whole":
            status, _ = served.ask(json.dumps(body).encode())
            return {200: "answered", 429: "refused, queue full"}.get(status, f"lost, {status}")
        case "stream":
            return "answered" if served.stream(body) else "refused, queue full"
        case "leave":
            served.stream(body | {"max_tokens": 1000}, most=chance.randint(1, 5))
            return "left in the middle"
        case "no JSON":
            return "refused, no JSON" if served.ask(b'{"prompt": ' * chance.randint(1, 1000))[0] == 400 else "lost"
        case "too large":
            return "refused, too large" if served.ask(b"x" * (33 * 2**20))[0] == 413 else "lost"
        case "wrong":
            body |= chance.choice([{"n": 2}, {"temperature": "hot"}, {"tools": [1]}, {"model": "x"}, {"prompt": 5}])
            return "refused, wrong" if served.ask(json.dumps(body).encode())[0] in (400, 404) else "lost"
        case kind:
            content = json.dumps(body | {"max_tokens": 1000}).encode()
            with socket.create_connection(("127.0.0.1", served.port), timeout=300) as client:
                client.sendall(HEAD % len(content) + (content if kind == "half-closed" else content[:-5]))
                if kind == "half-closed":
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
            return kind


def soak(served: Served, minutes: float) -> int:
    """Print what became of all requests, and how the server's memory grew; returns how many were lost."""
    fates, end, memory = Counter[str](), time.monotonic() + 60 * minutes, list[float]()

    def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            try:
                fates[fate(served, chance)] += 1
            except Exception as error:
                fates[f"lost: {type(error).__name__}: {error}"] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for each in clients:
        each.start()
    while any(each.is_alive() for each in clients):
        time.sleep(min(10, 6 * minutes))
        memory.append(served.memory)
    alive, _ = served.ask(json.dumps({"prompt": "a", "max_tokens": 1}).encode())
    for name, count in sorted(fates.items()):
        print(f"{count:9,} {name}")
    tenths = [memory[(len(memory) - 1) * i // 10] for i in range(11)]
    print(f"memory at every tenth of the time, MB: {' '.join(f'{each:,.0f}' for each in tenths)}")
    print(f"growth after the first: {tenths[-1] - tenths[1]:+,.0f} MB; ", end="")
    print("the server answers" if alive == 200 else "the server is dead")
    return sum(count for name, count in fates.items() if name.startswith("lost")) + (alive != 200)


def main() -> int:
    """Measure and soak; 1 if a request was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="gemma-3-270m")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak (default: %(default)s)")
    args = parser.parse_args()
    flags = ["-t", str(args.threads)] if args.threads else []
    with Served(args.model, flags) as served:
        if args.rounds:
            measure(served, args.model, args.threads, args.rounds)
        return bool(args.minutes and soak(served, args.minutes))


if __name__ == "__main__":
    sys.exit(main())
