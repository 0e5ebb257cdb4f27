"""Tasks of lm-evaluation-harness, run on a model; `dlm eval --tasks` is this."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_jax.convert.origin import weights_sha256
from dlm_jax.errors import UserError
from dlm_jax.files import write_text
from dlm_jax.harness.model import HarnessModel, document_name
from dlm_jax.models.bundle import Bundle

OWN_TASKS = Path(__file__).parent / "tasks"
BOOTSTRAP = 1000  # resamplings for the standard error of a metric that is no mean


def evaluate(model: HarnessModel, tasks: Sequence[str], out: Path | None = None, data: str | None = None,
             include_path: str | None = None, **arguments: Any
             ) -> tuple[dict[str, dict[str, float]], dict[str, list[dict]]]:
    """The metrics of each task, by name, with their standard errors; and the documents of each, with what was asked,
    answered and measured.

    out: a directory for `results.json`, in the harness's own format, `samples_TASK.jsonl`, and the answers so far: a
    command that is stopped and run again asks nothing twice. data: the folder of the files that our own tasks read.
    include_path: a folder of more task files. arguments: of the harness's `simple_evaluate`, such as limit and
    num_fewshot.

    Raises `UserError` for tasks that are unknown or whose documents cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(OWN_TASKS), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=folders, metadata={"data": data}, include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):  # those of the harness are thousands of files
        manager = TaskManager(include_path=folders, metadata={"data": data})
    check_tasks(tasks, manager)
    if arguments.get("apply_chat_template") and not model.tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; leave out --apply-chat-template")
    answers = None
    if out is not None:
        from sqlitedict import SqliteDict
        out.mkdir(parents=True, exist_ok=True)
        answers = str(out / f"answers-{identity(model)}")
        model.costs = SqliteDict(f"{answers}.costs.db", autocommit=True)
    found = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, use_cache=answers,
                            bootstrap_iters=BOOTSTRAP, **arguments)
    samples = found.pop("samples", {})
    if out is not None:
        write_results(found, samples, out)
    return {task: metrics_of(values) | speed(model, task, samples.get(task, []))
            for task, values in found["results"].items()}, samples


def speed(model: HarnessModel, task: str, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tokens per forward pass of what was written for a task's documents; nothing if nothing was."""
    costs = [model.costs.get(document_name(task, document)) for document in {sample["doc_id"] for sample in samples}]
    tokens, passes = (sum(cost[i] for cost in costs if cost) for i in (0, 1))
    return {"tokens_per_forward": tokens / passes} if passes else {}


def check_tasks(tasks: Sequence[str], manager: Any) -> None:
    """Raises `UserError` for tasks that are unknown or whose documents cannot be had."""
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        own = sorted(path.stem for path in OWN_TASKS.glob("*.yaml"))
        raise UserError(f"there is no task {unknown[0]}; `lm_eval ls tasks` lists those of the harness, and "
                        f"{', '.join(own)} read files of yours")
    try:
        manager.load(list(tasks))
    except UserError:
        raise
    except Exception as error:  # of the network, the hub, or a task file
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot get the documents of {', '.join(tasks)} ({cause}); check the network, or choose "
                        "tasks that read files of yours") from error


def identity(model: HarnessModel) -> str:
    """16 hex digits of all that an answer depends on: weights, tokenizer and settings."""
    lm, scorer = model.lm, model.scorer
    parts = [weights_sha256(Bundle(lm.config, lm.params, lm.spec)), repr(lm.spec), repr(scorer.model), model.method,
             scorer.max_draws, repr(model.settings), model.max_gen_toks, model.add_bos_token, model.tokenizer_name]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write_results(found: dict[str, Any], samples: dict[str, list[dict]], out: Path) -> None:
    """`results.json`, and the documents with what was asked and answered."""
    from lm_eval.utils import handle_non_serializable
    for task, documents in samples.items():
        lines = (json.dumps(each, default=handle_non_serializable, ensure_ascii=False) for each in documents)
        write_text(out / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(out / "results.json", json.dumps(found, default=handle_non_serializable, indent=2) + "\n")


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results, under short names: `acc`, `acc_stderr`, `exact_match,strict-match`."""
    return {name.removesuffix(",none"): float(value) for name, value in values.items()
            if name not in ("alias", "sample_len") and isinstance(value, (int, float))}
