"""Whatever happens to a file from outside, it is read rightly or refused in one sentence: never a traceback, a hang, a
leftover or a heap of memory.

Each example changes one file of one format, calls the real entry point, and judges the outcome by oracles of its own.
`make fuzz` runs many more examples (`DLM_FUZZ` of each format) and prints what came of them.
"""

import collections
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlm_jax.adapt import adapt
from dlm_jax.commands.main import main
from dlm_jax.commands.sample_file import content_of, read_lines
from dlm_jax.config import Config, load_config
from dlm_jax.convert.origin import Origin, origin_of, read_origin, write_origin
from dlm_jax.convert.peft import write_peft
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.text import read_documents
from dlm_jax.errors import UserError
from dlm_jax.files import write_sums
from dlm_jax.language_model import load
from dlm_jax.loading import load_bundle
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.lora import Lora, trained_table
from dlm_jax.models.weights import flatten, unflatten
from dlm_jax.runs.checksum import SEAL, sealed
from dlm_jax.runs.lock import parse
from dlm_jax.runs.read import read_work_directory
from dlm_jax.runs.workdir import claimed
from dlm_jax.training.metrics import JsonLines

EXAMPLES = int(os.environ.get("DLM_FUZZ", 6))  # of each format
SECONDS, MEMORY = 10.0, 2**30  # an example may take so long, and all together so many more bytes than before


class Raw(str):
    """Text that stands in a JSON file as it is."""


VALUES = (None, True, False, 0, 1, -1, 7, 1.5, 2**31, 10**9, -10**9, 10**400, 1e308, 1e-320, "", "x", "false", "1",
          "../x", [], {}, [1], [[0]], {"a": 1}, [None, "x"], "x" * 10_000, "\x1b[31m\n",
          *map(Raw, ("NaN", "-Infinity", "1e999", "9" * 5000, r'"\ud800"', "[" * 99 + "]" * 99, "[" * 9999 + "]" * 9999,
                     '{"a": 1, "a": 2}', "01", "'x'", "", '{"__class__": "x"}', "true false")))


def spell(value: Any) -> str:
    """JSON text; unlike `json.dumps` it spells `Raw` and lists of pairs, which may repeat a key."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {spell(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spell, value)) + "]"
    return json.dumps(value) if not isinstance(value, int) or abs(value) < 10**300 else "1" + "0" * 400


class Pairs(list):
    """The (key, value) pairs of an object."""


def changed_tree(draw: Callable, tree: Any) -> Any:
    """The tree with one change at one place."""
    if not isinstance(tree, Pairs | list) or not tree or draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(VALUES))
    index = draw(st.integers(0, len(tree) - 1))
    action = draw(st.sampled_from(("replace", "replace", "replace", "replace", "remove", "twice", "rename", "inside")))
    pairs = isinstance(tree, Pairs)
    before, child, after = tree[:index], tree[index], tree[index + 1:]
    key, value = child if pairs else (None, child)
    if isinstance(value, Pairs | list) and value and action != "remove":
        action = "inside"
    if action == "remove":
        middle = []
    elif action == "twice":
        middle = [child, (key, draw(st.sampled_from(VALUES))) if pairs else child]
    elif action == "rename" and pairs:
        middle = [(draw(st.sampled_from(("", "x", "\x00", key + "s", key.upper()))), value)]
    else:
        new = changed_tree(draw, value) if action == "inside" else draw(st.sampled_from(VALUES))
        middle = [(key, new)] if pairs else [new]
    return type(tree)([*before, *middle, *after])


def changed_json(draw: Callable, text: bytes) -> bytes:
    """JSON text with a value changed, or with its bytes damaged."""
    if draw(st.integers(0, 4)) == 0:
        return changed_bytes(draw, text)
    return spell(changed_tree(draw, json.loads(text, object_pairs_hook=Pairs))).encode()


def changed_bytes(draw: Callable, data: bytes) -> bytes:
    """Bytes that are flipped, cut off, inserted or repeated."""
    place = draw(st.integers(0, len(data)))
    match draw(st.sampled_from(("flip", "cut", "insert", "repeat"))):
        case "flip" if place < len(data):
            return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1:]
        case "insert":
            return data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place:]
        case "repeat":
            return data[:place] + data
    return data[:place]


def changed_tensors(draw: Callable, data: bytes) -> bytes:
    """A safetensors file whose header, or the length of it, is changed."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8:8 + size], data[8 + size:]
    if draw(st.booleans()):
        header = changed_json(draw, header)
    stated = len(header) if draw(st.booleans()) else draw(st.sampled_from((0, 1, 7, size - 1, 2**31, 2**63, 2**64 - 1)))
    return stated.to_bytes(8, "little") + header + rest


def changed_lines(draw: Callable, data: bytes) -> bytes:
    """JSON lines of which one is changed."""
    lines = data.splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    return b"\n".join([*lines[:index], changed_json(draw, lines[index]), *lines[index + 1:]]) + b"\n"


def strict(data: bytes) -> Any:
    """An independent strict reader: the value, or an error."""
    def once(pairs: list) -> dict:
        assert len(dict(pairs)) == len(pairs), "a key stands twice"
        return dict(pairs)

    value = json.loads(data.decode(), object_pairs_hook=once)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # no NaN, no infinity, no half surrogate pair
    return value


def valid_model(fields: dict) -> None:
    """What has to hold of a description of a model that was accepted."""
    model = fields["model"]
    sizes = [model[name] for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width",
                                      "max_length")]
    assert all(type(size) is int and 0 < size < 2**27 for size in sizes) and model["heads"] % model["kv_heads"] == 0
    assert all(type(model[name]) is bool for name in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tied_head"))
    assert type(model["norm_eps"]) is float and 0 <= model["norm_eps"] <= 1
    rope = model["rope"]
    assert rope is None or all(type(rope[name]) is float and 0 < rope[name] < 1e39 for name in
                               ("theta", "factor", "low_factor", "high_factor"))
    assert rope is None or rope["scaling"] != "llama3" or rope["low_factor"] < rope["high_factor"]
    for name in ("mask_token_id", "bos_token_id", "eos_token_id"):
        assert fields[name] is None or (type(fields[name]) is int and 0 <= fields[name] < model["vocab_size"])
    assert fields["block_size"] is None or (type(fields["block_size"]) is int
                                            and 0 < fields["block_size"] <= model["max_length"])


class Workshop:
    """Intact directories of every kind, and a place for changed ones."""

    def __init__(self, root: Path, base: Path, prepared: Path, config: Config) -> None:
        self.root, self.config, self.out = root, config, root / "out"
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.slowest: dict[str, float] = collections.defaultdict(float)
        bundle = load_bundle(base)
        self.make_hugging_face(base)
        self.command("import", base, "--out", root / "native", "--mask", "new", "--recipe", "diffullama")
        self.lm = load(root / "native")
        shutil.copytree(prepared, root / "dataset")
        (root / "origin").mkdir()
        write_origin(root / "origin", Origin("base", None, "0" * 64, bundle.config.vocab_size, "new"))
        self.make_adapter(bundle)
        (root / "lines").mkdir()
        (root / "lines" / "requests.jsonl").write_text('{"id": "a", "prompt": "the cat"}\n{"id": 2, "infill": '
                                                       '"the [MASK:2-3] dog", "max_tokens": 3}\n'
                                                       '{"id": 3, "prompt": ""}\n')
        (root / "lines" / "text.jsonl").write_text('{"text": "the cat"}\n{"text": "the dog", "score": 1.5}\n')
        (root / "lines" / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1.5, "x": None}) + "\n"
                                                              for step in (1, 2, 3, 4)))
        (root / "lines" / "lock").write_text(json.dumps({"pid": 1, "host": "h", "started": "2026-01-01T00:00:00+00:00",
                                                         "kernel": True, "beats": 3}))

    def make_hugging_face(self, base: Path) -> None:
        """One with its weights in a single file, and one with an index."""
        shutil.copytree(base, self.root / "hf")
        config = json.loads((base / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        (self.root / "hf" / "config.json").write_text(json.dumps(config))
        (self.root / "hf" / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 0]}')
        indexed = shutil.copytree(self.root / "hf", self.root / "indexed")
        (indexed / "model.safetensors").rename(indexed / "a.safetensors")
        size = int.from_bytes((indexed / "a.safetensors").read_bytes()[:8], "little")
        names = json.loads((indexed / "a.safetensors").read_bytes()[8:8 + size]).keys() - {"__metadata__"}
        (indexed / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": 9}, "weight_map": {name: "a.safetensors" for name in sorted(names)}}))

    def make_adapter(self, bundle: Bundle) -> None:
        """A PEFT directory of random adapters."""
        lora = Lora(rank=2, modules_to_save="")
        trained = {path: np.ones(w.shape, np.float32) for path, w in trained_table(bundle.config, lora).items()}
        (self.root / "adapter").mkdir()
        write_peft(self.root / "adapter", unflatten(trained), bundle.config, lora, origin_of(bundle, "hf", "new"))

    def command(self, *arguments: object) -> None:
        """Runs `dlm`, and raises `UserError` with the sentence with which it refuses."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main([str(argument) for argument in arguments])
        if code:
            sentence = said.getvalue()
            assert code == 2 and sentence.startswith("dlm: ") and sentence.count("\n") == 1, sentence[-2000:]
            raise UserError(sentence)

    @contextlib.contextmanager
    def changed(self, name: str, data: bytes) -> Iterator[Path]:
        """The file called `name` with other bytes, for as long as the block runs."""
        file = self.root / name
        intact = file.read_bytes()
        file.write_bytes(data)
        try:
            yield file
        finally:
            file.write_bytes(intact)


def check_import(shop: Workshop, file: Path, *flags: object) -> None:
    source = shop.root / "hf" if file.parent.name == "adapter" else file.parent
    shop.command("import", source, "--out", shop.out, *flags)
    valid_model(json.loads((shop.out / "dlm.json").read_text()))
    if file.suffix == ".json":
        strict(file.read_bytes())


def check_adapter(shop: Workshop, file: Path) -> None:
    check_import(shop, file, "--adapter", file.parent)


def check_native(shop: Workshop, file: Path) -> None:
    write_sums(file.parent)
    shop.command("export", file.parent, "--out", shop.out)
    valid_model(strict(file.read_bytes()))


def check_dataset(shop: Workshop, file: Path) -> None:
    dataset = Dataset.open(file.parent)
    tokens, _ = dataset.rows(slice(0, 2))
    fields = strict(file.read_bytes())
    assert tokens.shape[1] == fields["length"]
    assert sum(each["records"] for each in fields["shards"]) == fields["records"]


def check_origin(shop: Workshop, file: Path) -> None:
    origin, fields = read_origin(file.parent), strict(file.read_bytes())
    assert vars(origin) == {"revision": None, "mask": None} | fields and type(origin.vocab_size) is int


def check_checkpoint(shop: Workshop, file: Path) -> None:
    # Seal what can be sealed, as an attacker would.
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        fields = json.loads(file.read_bytes())
        fields.pop(SEAL, None)
        file.write_text(json.dumps(sealed(fields)))
    bundle = read_work_directory(file.parents[3])
    assert flatten(bundle.params)["embed.tokens"].shape == (bundle.config.vocab_size, bundle.config.width)
    strict(file.read_bytes())


def check_run(shop: Workshop, file: Path) -> None:
    with claimed(file.parent, shop.config):
        pass
    fields = strict(file.read_bytes())
    assert fields["train"]["seed"] == 0 and type(fields["recipe"]["anneal_steps"]) is int


def check_lock(shop: Workshop, file: Path) -> None:
    holder = parse(file.read_bytes().decode(errors="replace"))
    if holder is None:
        raise UserError("it is not a lock")
    assert type(holder.pid) is int and type(holder.kernel) is bool and type(holder.host) is str


def check_metrics(shop: Workshop, file: Path) -> None:
    before = file.read_bytes().splitlines()
    JsonLines(file, 3).close()
    good = []
    for line in before:
        with contextlib.suppress(Exception):
            if type(strict(line)["step"]) is int and strict(line)["step"] <= 3:
                good.append(line)
    kept = file.read_bytes().splitlines()
    assert set(kept) <= set(good) and len(set(good) - set(kept)) <= 1  # one that is nested deeper than we read may go
    if len(good) < 3:
        raise UserError("a line was left out")


def check_requests(shop: Workshop, file: Path) -> None:
    lines = list(read_lines(shop.lm, content_of(file), 4))
    errors = [line.error for line in lines if line.error is not None]
    json.dumps([line.id for line in lines], allow_nan=False, ensure_ascii=False).encode()
    assert len(lines) - len(errors) >= 1 and all(line.requests for line in lines if line.error is None)
    if errors:
        raise UserError(errors[0])


def check_text(shop: Workshop, file: Path) -> None:
    for document in read_documents([file]):
        assert document and document.encode()


IMPORTED = ("hf/config.json", "hf/generation_config.json", "hf/tokenizer.json", "hf/tokenizer_config.json",
            "indexed/model.safetensors.index.json")
FORMATS: dict[str, tuple[Callable, Callable]] = {  # file: (how it is changed, how it is read and judged)
    **{name: (changed_json, check_import) for name in IMPORTED},
    "hf/model.safetensors": (changed_tensors, check_import),
    "adapter/adapter_config.json": (changed_json, check_adapter),
    "adapter/adapter_model.safetensors": (changed_tensors, check_adapter),
    "native/dlm.json": (changed_json, check_native),
    "dataset/dataset.json": (changed_json, check_dataset),
    "origin/origin.json": (changed_json, check_origin),
    "run/checkpoints/2/about/metadata": (changed_json, check_checkpoint),
    "run/config.json": (changed_json, check_run),
    "lines/lock": (changed_json, check_lock),
    "lines/metrics.jsonl": (changed_lines, check_metrics),
    "lines/requests.jsonl": (changed_lines, check_requests),
    "lines/text.jsonl": (changed_lines, check_text),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, base, prepared, tiny_config, tiny_run) -> Iterator[Workshop]:
    """The workshop, whose counts are printed at the end."""
    root = tmp_path_factory.mktemp("fuzz")
    config = load_config(tiny_config, [*tiny_run, "train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"])
    adapt(config, root / "run")
    shop = Workshop(root, base, prepared, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield shop
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 2**10
    print("\n| file | accepted | refused | slowest |\n|---|---:|---:|---:|")
    for name, count in shop.counts.items():
        print(f"| {name} | {count['accepted']:,} | {count['refused']:,} | {shop.slowest[name]:.2f} s |")
    print(f"\npeak memory grew by {grown / 2**20:.0f} MiB")
    assert grown < MEMORY


def too_slow(*_: object) -> None:
    raise AssertionError(f"an example takes more than {SECONDS:.0f} s")


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_file_is_read_rightly_or_refused_in_one_sentence(shop, name):
    change, check = FORMATS[name]
    intact = (shop.root / name).read_bytes()
    with shop.changed(name, intact) as file:
        check(shop, file)  # unchanged it is accepted
        shutil.rmtree(shop.out, ignore_errors=True)
    present = set(shop.root.rglob("*"))

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def example(data: Any) -> None:
        began, outcome = time.monotonic(), "accepted"
        signal.signal(signal.SIGALRM, too_slow)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with shop.changed(name, change(data.draw, intact)) as file:
                check(shop, file)
        except UserError as error:
            outcome = "refused"
            assert str(error).strip() and len(str(error)) < 2000
            assert not shop.out.exists()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            shutil.rmtree(shop.out, ignore_errors=True)
        assert set(shop.root.rglob("*")) == present  # nothing is left
        shop.counts[name][outcome] += 1
        shop.slowest[name] = max(shop.slowest[name], time.monotonic() - began)

    example()
