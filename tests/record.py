"""Record what other programs answer: python tests/record.py [what to give pytest]

Needs pip install -e ".[oracles]". Runs the tests marked `oracle`, whose programs run live, and writes their answers to
tests/data/recorded/: arrays as safetensors, everything else as json, each with the programs, their versions, and the
seeds. Without arguments, and if all tests pass, answers that no test asks for any more are dropped.
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from support import checkpoints, oracles

SEEDS = f"weights {checkpoints.SEED}, token ids 11 and 13, images 3, blocks of weights 0"


def installed(program: str) -> str:
    try:
        return f"{program} {version(program)}"
    except PackageNotFoundError:
        return program


class Recorder:
    """A pytest plugin: programs' answers are kept while tests run, and written at the end."""

    def pytest_sessionstart(self) -> None:
        oracles.Mode.recording = {}

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        for stem, answers in oracles.Mode.recording.items():
            write(stem, answers, whole=exitstatus == 0 and not sys.argv[1:])


def write(stem: str, answers: dict, whole: bool) -> None:
    programs = ", ".join(installed(program) for program in oracles.PROGRAMS_OF[stem].split(", "))
    made = {"programs": programs, "by": "python tests/record.py", "seeds": SEEDS}
    values, arrays = {}, {}
    for key, answer in answers.items():
        if isinstance(answer, np.ndarray):
            arrays[key] = np.ascontiguousarray(answer)
        elif isinstance(answer, (list, tuple)) and answer and isinstance(answer[0], np.ndarray):
            arrays |= {f"{key}#{i:02}": np.ascontiguousarray(part) for i, part in enumerate(answer)}
        else:
            values[key] = answer
    oracles.DATA.mkdir(exist_ok=True)
    at = oracles.DATA / f"{stem}.safetensors"
    if arrays:
        save_file((load_file(at) if at.exists() and not whole else {}) | arrays, at, metadata=made)
        at.chmod(0o644)
    at = oracles.DATA / f"{stem}.json"
    if values:
        before = json.loads(at.read_text("utf-8"))["answers"] if at.exists() and not whole else {}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted((before | values).items())]
        body = ",\n".join(lines)
        at.write_text(f'{{"made": {json.dumps(made)},\n"answers": {{\n{body}\n}}}}\n', "utf-8")


if __name__ == "__main__":
    sys.exit(pytest.main(["-m", "oracle", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Recorder()]))
