"""`make attacks`: flipped bits, two runs on one directory, kills and planted files, in numbers; prints a table.

    python tests/attacks.py [--scale 1.0]

The tests hold each invariant once; this repeats them at random places and times, with the real commands.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.models.weights import flatten

DLM = [sys.executable, "-m", "dlm_jax"]
STEPS = 12
CLOCKS = ("tokens_per_second", "seconds_per_step", "data_seconds", "host_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description="Attacks on the commands, in numbers.")
    parser.add_argument("--scale", type=float, default=1.0, help="of 200 flips, 20 pairs and 40 kills")
    scale = parser.parse_args().scale
    print("| attack | outcomes |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_inputs(folder)
        for title, attack, times in (("bits flipped", flips, 200), ("pairs of runs", pairs, 20), ("kills", kills, 40),
                                     ("planted files", planted, 1)):
            outcomes = sorted(attack(folder, max(1, round(scale * times))).items())
            print(f"| {title} | {', '.join(f'{count} {what}' for what, count in outcomes)} |", flush=True)


def prepare_inputs(folder: Path) -> None:
    """A text, requests, records, a native and a Hugging Face directory, and a finished run with several checkpoints."""
    chance = random.Random(0)
    documents = [" ".join(chance.choices("def return self if for in print None x y".split(), k=40)) for _ in range(400)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    (folder / "requests.jsonl").write_text("".join(
        json.dumps({"id": str(i), "prompt": documents[i][:20]}) + "\n" for i in range(6)))
    lm = dlm_jax.load("bundled")
    lm.save(folder / "native")
    lm.export(folder / "hf")
    dlm(*prepare_command(folder), "--out", folder / "records")
    dlm(*train_command(folder), "--workdir", folder / "run")
    dlm("export", folder / "run", "--out", folder / "adapted")


def prepare_command(folder: Path) -> list[object]:
    return ["prepare", "--text", folder / "text.txt", "--model", folder / "native", "--length", 32, "--processes", 2]


def train_command(folder: Path) -> list[object]:
    overrides = {"model.base": folder / "native", "data.train": folder / "records",
                 "data.validation": folder / "text.txt", "data.validation_records": 4, "data.seq_length": 32,
                 "train.steps": STEPS, "train.global_batch_size": 4, "train.grad_accum_steps": 1,
                 "recipe.anneal_steps": 4, "optimizer.warmup_steps": 2, "log.every": 1, "checkpoint.every": 2,
                 "evaluate.every": STEPS, "evaluate.mc_samples": 1}
    return ["train", "--config", "tiny", *(f"--config.{key}={value}" for key, value in overrides.items())]


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen([*DLM, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def dlm(*arguments: object) -> None:
    """Runs a command that must succeed."""
    process = start(*arguments)
    _, said = process.communicate()
    assert process.returncode == 0, said


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flatten(dlm_jax.load(directory).params).items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def flips(folder: Path, times: int) -> Counter[str]:
    """Single bits of the parameters in a run's newest checkpoint, and of a native directory, read by `load`."""
    chance, outcomes, victim = random.Random(1), Counter[str](), folder / "victim"
    good = {name: weights(folder / name) for name in ("run", "native")}
    for attempt in range(times):
        name = ("run", "native")[attempt % 2]
        shutil.copytree(folder / name, victim)
        place = victim / "checkpoints" / str(STEPS) / "params" if name == "run" else victim  # all that `load` reads
        files = [file for file in sorted(place.rglob("*")) if file.is_file() and file.stat().st_size]
        file = chance.choice(files) if attempt % 4 < 2 else max(files, key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            found = weights(victim)
            outcomes["without effect" if equal(found, good[name]) else "USED SILENTLY"] += 1
        except UserError:
            outcomes["refused"] += 1
        shutil.rmtree(victim)
    return outcomes


def losses(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def pairs(folder: Path, times: int) -> Counter[str]:
    """Two runs started at once on one work directory."""
    outcomes = Counter[str]()
    for attempt in range(times):
        workdir = folder / "pair" / str(attempt)
        both = [start(*train_command(folder), "--workdir", workdir) for _ in range(2)]
        said = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        right = codes == [0, 2] and not any("Traceback" in text for text in said)
        right = right and losses(workdir) == losses(folder / "run")
        outcomes["one trained as if alone, one was refused" if right else f"WRONG {codes}"] += 1
    return outcomes


def kills(folder: Path, times: int) -> Counter[str]:
    """A command killed at a random time, and run again."""
    jobs: dict[str, tuple[list[object], Callable[[Path], object]]] = {
        "import": (["import", folder / "hf", "--mask", "new", "--out"], digests),
        "export": (["export", folder / "run", "--out"], digests),
        "prepare": ([*prepare_command(folder), "--out"], digests),
        "train": ([*train_command(folder), "--workdir"], losses),
        "sample": (["sample", folder / "run", "--max-tokens", 4, "--prompts", folder / "requests.jsonl", "--out"],
                   Path.read_text)}
    chance, outcomes = random.Random(2), Counter[str]()
    for name, (job, result) in jobs.items():
        begin, whole = time.monotonic(), folder / "whole" / name / "out"
        whole.parent.mkdir(parents=True)
        dlm(*job, whole)
        duration, expected = time.monotonic() - begin, result(whole)
        for attempt in range(max(1, times // len(jobs))):
            out = folder / "killed" / f"{name}{attempt}" / "out"
            out.parent.mkdir(parents=True)
            process = start(*job, out)
            time.sleep(duration * chance.random())
            process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            process.communicate()
            if name in ("train", "sample") or not out.exists():
                dlm(*job, out)
            left = [path.name for path in out.parent.iterdir() if path != out]
            right = result(out) == expected and not left
            outcomes["same result, nothing left" if right else f"WRONG: {name}, {left}"] += 1
    return outcomes


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.rglob("*"))
            if file.is_file()}


def planted(folder: Path, times: int) -> Counter[str]:
    """Files that a stranger planted: each command must end within 5 s and 500 MB of what a refusal takes anyway."""
    place = folder / "planted"
    shutil.copytree(folder / "native", place / "fifo")
    (place / "fifo" / "dlm.json").unlink()
    os.mkfifo(place / "fifo" / "dlm.json")
    os.mkfifo(place / "text.txt")
    (place / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + bytes([97]) * 2**29))
    (place / "led" / "checkpoints").mkdir(parents=True)
    (place / "led" / "remote").write_text(str(folder / "run"))
    foreign = place / "foreign"
    shutil.copytree(folder / "hf", foreign)
    settings = json.loads((foreign / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.E", None]}}
    (foreign / "tokenizer_config.json").write_text(json.dumps(settings))
    (foreign / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')")
    prepared = ["prepare", "--model", folder / "native", "--length", 32, "--out", place / "out", "--text"]
    usual_seconds, usual_rss, _ = measured("eval", folder / "native", "--tasks", "nelbo", "--text", place / "none.txt")
    outcomes = Counter[str]()
    for what, code, command in (("a FIFO as a model", 2, ["export", place / "fifo", "--out", place / "out"]),
                                ("a FIFO as text", 2, [*prepared, place / "text.txt"]),
                                ("a bomb", 2, [*prepared, place / "bomb.jsonl.gz"]),
                                ("a remote", 2, ["export", place / "led", "--out", place / "out"]),
                                ("an auto_map", 0, ["import", foreign, "--out", place / "imported"])):
        seconds, rss, returned = measured(*command)
        right = returned == code and seconds - usual_seconds < 5 and rss - usual_rss < 500e6
        outcomes[f"{what} {'withstood' if right else 'WRONG'} ({seconds - usual_seconds:+.1f} s, "
                 f"{(rss - usual_rss) / 1e6:+.0f} MB)"] += 1
    passed_on = [file for file in (place / "imported").rglob("*.json") if "auto_map" in file.read_text()]
    outcomes["auto_map neither run nor passed on" if not passed_on and not (place / "ran").exists() else "WRONG"] += 1
    return outcomes


# Runs its arguments; prints their peak memory and exit code. In a small process, since a child counts its parent's.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, code)
"""


def measured(*arguments: object) -> tuple[float, float, int]:
    """Seconds, peak bytes and exit code of a command."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURE, *DLM, *map(str, arguments)], capture_output=True, text=True)
    rss, code = map(int, done.stdout.split())
    return time.monotonic() - begin, rss, code


if __name__ == "__main__":
    main()
