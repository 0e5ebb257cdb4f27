"""`dlm eval`: the likelihood of texts, and tasks of lm-evaluation-harness."""

import argparse
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlm_jax.commands.arguments import (
    MODEL_HELP,
    TEXT_FIELD_HELP,
    Arguments,
    add_decoding_flags,
    add_fsdp_flag,
    add_seed_flag,
    add_tensor_flag,
    integer_at_least,
    text_or_stdin,
    unicode_text,
)
from dlm_jax.commands.progress import count_progress
from dlm_jax.errors import UserError
from dlm_jax.harness.frontier import aup, strategies

LIKELIHOODS = ("nelbo", "ar_nll")
INFILLING = ("humaneval_single_line", "humaneval_multi_line", "humaneval_span", "humaneval_span_light",
             "rocstories_infill", "lambada_infill", "triviaqa_infill")
GENERATIVE = "generative_perplexity"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm eval`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--tasks", required=True, type=task_names, metavar="TASK,TASK,...",
                        help="nelbo: the diffusion model's upper bound; ar_nll: exact, left to right (both in nats per "
                             f"token of the --text); {', '.join(INFILLING)}: filling the middle of the texts in "
                             f"--data; {GENERATIVE}: of samples, under --judge; or tasks of "
                             "lm-evaluation-harness, such as hellaswag,gsm8k")
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="for nelbo and ar_nll: text, JSONL or Parquet files; - reads one document from stdin")
    parser.add_argument("--text-field", type=unicode_text, default="text", metavar="NAME", help=TEXT_FIELD_HELP)
    parser.add_argument("--limit", type=integer_at_least(1), metavar="N", help="read at most N documents of each task")
    parser.add_argument("--mc-samples", type=integer_at_least(1), default=4, metavar="N",
                        help="for nelbo: Monte Carlo samples (noisings) per text (default 4)")
    parser.add_argument("--data", metavar="DIR", help="the files of tasks that fill a middle or are named ..._local")
    add_decoding_flags(parser)
    add_seed_flag(parser)
    parser.add_argument("--judge", metavar="MODEL", help=f"for {GENERATIVE}: an autoregressive model")
    parser.add_argument("--samples", type=integer_at_least(1), default=64, metavar="N",
                        help=f"for {GENERATIVE}: how many (default 64)")
    parser.add_argument("--max-tokens", type=integer_at_least(1), default=128, metavar="N",
                        help=f"for {GENERATIVE}: the most tokens of each (default 128)")
    parser.add_argument("--out", metavar="DIR",
                        help="write report.json, report.md and report.html with pictures there, and for tasks of "
                             "lm-evaluation-harness its own results and the answers so far: a command that was stopped "
                             "and is run again asks nothing twice")
    parser.add_argument("--frontier", type=strategies, metavar="STRATEGY[@STEPS],...",
                        help="for tasks that generate: the quality and the tokens per forward pass with each of these "
                             "unmasking strategies, and accuracy under parallelism (AUP)")
    parser.add_argument("--allow-code-execution", action="store_true",
                        help="run the programs that the model writes for humaneval_..., confined: without files, "
                             "processes and network")
    add_tensor_flag(parser)
    add_fsdp_flag(parser)
    harness = parser.add_argument_group("tasks of lm-evaluation-harness, which needs pip install 'dlm-jax[eval]'")
    harness.add_argument("--against", metavar="MODEL",
                         help="ask this model the same and say where the difference exceeds noise, such as the "
                              "autoregressive base")
    harness.add_argument("--include-path", metavar="DIR", help="a folder of more task files")
    harness.add_argument("--likelihood", choices=["monte_carlo", "decoding_order", "diffullama"], default="monte_carlo",
                         help="a diffusion model's likelihood: its bound by Monte Carlo (default), or exact in the "
                              "order in which it decodes; or the score of DiffuLLaMA's evaluation, for its table")
    harness.add_argument("--max-draws", type=integer_at_least(8), default=32, metavar="N",
                         help="the most Monte Carlo draws per question (default 32); fewer where fewer settle it, "
                              "but all for diffullama")
    harness.add_argument("--num-fewshot", type=integer_at_least(0), metavar="N", help="examples in each prompt")
    harness.add_argument("--batch-size", type=integer_at_least(1), metavar="N",
                         help="the most texts per batch, which changes no result")
    harness.add_argument("--apply-chat-template", action="store_true", help="ask in the tokenizer's chat format")


def task_names(text: str) -> list[str]:
    """An argument type: names, separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of tasks such as nelbo or hellaswag,piqa")
    return list(dict.fromkeys(names))


def run(a: Arguments) -> dict[str, Any]:
    """Evaluates; returns the metrics of each task, or those of the only one."""
    check_flags(a)
    from dlm_jax.data.text import read_documents
    from dlm_jax.language_model import load
    from dlm_jax.models.sharding import in_mesh_of
    own = [task for task in a.tasks if task in LIKELIHOODS]
    documents: Iterator[str] = iter(())
    if own:
        documents = iter((text_or_stdin("-"),)) if a.text == ["-"] else read_documents(a.text, a.text_field)
    lm = load(a.model, a.tensor, a.fsdp)
    texts = list(itertools.islice(documents, a.limit))
    with in_mesh_of(lm.params):
        results = {task: likelihood_of(lm, task, texts, a) for task in own}
        if a.frontier:
            results |= frontier_of(lm, a)
        else:
            results |= generated_and_asked(lm, a, None if a.out is None else Path(a.out))
    if a.out:
        report(lm, texts, results, a)
    return {"task": a.tasks[0], **results[a.tasks[0]]} if len(results) == 1 and not harness_tasks(a) else results


def check_flags(a: Arguments) -> None:
    """Raises `UserError` for flags that do not fit the tasks."""
    own = [task for task in a.tasks if task in LIKELIHOODS]
    if own and not a.text:
        raise UserError(f"{own[0]} is a likelihood of texts; name their files with --text")
    if GENERATIVE in a.tasks and a.judge is None:
        raise UserError(f"{GENERATIVE} is measured by an autoregressive model; name one with --judge")
    if a.against and not harness_tasks(a):
        raise UserError("--against compares tasks of lm-evaluation-harness; add one to --tasks or leave it out")
    if a.text and not own:
        raise UserError("--text is for nelbo and ar_nll; add one of them to --tasks or leave it out")
    if a.frontier and (own or a.against):
        raise UserError("--frontier compares ways to generate; leave out --against and the tasks nelbo and ar_nll")
    if a.out and importlib.util.find_spec("matplotlib") is None:
        raise UserError("the report of --out has pictures and matplotlib is not installed; pip install 'dlm-jax[eval]'")


def harness_tasks(a: Arguments) -> list[str]:
    """The tasks that are not ours."""
    return [task for task in a.tasks if task not in (*LIKELIHOODS, *INFILLING, GENERATIVE)]


def generated_and_asked(lm: Any, a: Arguments, out: Path | None) -> dict[str, Any]:
    """The metrics of each task that is no likelihood of texts."""
    from dlm_jax.language_model import load
    results = {task: infilling_result(lm, task, a) for task in a.tasks if task in INFILLING}
    if GENERATIVE in a.tasks:
        results[GENERATIVE] = generative_result(lm, load(a.judge, a.tensor, a.fsdp), a)
    return results | (harness_results(lm, harness_tasks(a), a, out) if harness_tasks(a) else {})


def frontier_of(lm: Any, a: Arguments) -> dict[str, Any]:
    """For each task its metrics with every strategy of --frontier, and the AUP of those whose quality is a share."""
    points: dict[str, dict[str, Any]] = {}
    for strategy in a.frontier:
        chosen = argparse.Namespace(**vars(a) | strategy._asdict())
        out = None if a.out is None else Path(a.out) / str(strategy).replace(":", "_")
        for task, metrics in generated_and_asked(lm, chosen, out).items():
            if "tokens_per_forward" not in metrics:
                raise UserError(f"{task} generates nothing, so it has no frontier; leave it or --frontier out")
            points.setdefault(task, {})[str(strategy)] = metrics
    results: dict[str, Any] = {}
    for task, found in points.items():
        quality = next(iter(next(iter(found.values()))))
        pairs = [(each["tokens_per_forward"], each[quality]) for each in found.values()]
        results[task] = {**({} if task == GENERATIVE else {"aup": aup(pairs)}), "points": found}
    return results


def report(lm: Any, texts: list[str], results: dict[str, Any], a: Arguments) -> None:
    """Writes the report of --out."""
    from dlm_jax.commands.show_sample import settings_of
    from dlm_jax.evaluation.diagnosis import diagnose
    from dlm_jax.evaluation.log_likelihood import AR, denoising_recipe
    from dlm_jax.evaluation.prediction import Denoiser
    from dlm_jax.harness.report import facts_of, write_report
    from dlm_jax.sampling.settings import Settings
    diagnosis = None
    if texts:
        ar = a.tasks[0] == "ar_nll" or not lm.spec.is_diffusion
        model = Denoiser(lm.config, AR if ar else denoising_recipe(lm.spec), lm.spec.mask_token_id)
        rows = [row for row in (lm.encode(text)[:lm.config.max_length] for text in texts) if len(row) > 1]
        diagnosis = diagnose(lm.params, model, rows, seed=a.seed)
    write_report(Path(a.out), facts_of(lm, a.model, Settings(**settings_of(a))), results, diagnosis)


def likelihood_of(lm: Any, task: str, texts: list[str], a: Arguments) -> dict[str, Any]:
    """Nats per token, and over how many tokens."""
    if task == "nelbo" and lm.spec.mask_token_id is None:
        print("this model has no mask token: a new one, with the mean embedding, is used instead", file=sys.stderr)
    with count_progress("measured") as progress:
        if task == "ar_nll":
            result = lm.ar_nll(texts, progress)
        else:
            result = lm.nelbo(texts, mc_samples=a.mc_samples, seed=a.seed, progress=progress)
    error = {} if math.isnan(result.error) else {"standard_error": result.error}
    return {"nats_per_token": result, **error, "tokens": result.tokens, "texts": len(texts)}


def infilling_result(lm: Any, task: str, a: Arguments) -> dict[str, Any]:
    """The grades of what was written into the middle of texts."""
    from dlm_jax.commands.show_sample import settings_of
    from dlm_jax.harness.infilling import evaluate_infilling
    from dlm_jax.sampling.settings import Settings
    with count_progress("graded") as progress:
        return evaluate_infilling(lm, task, a.data, Settings(**settings_of(a)), a.limit, a.allow_code_execution,
                                  progress)


def generative_result(lm: Any, judge: Any, a: Arguments) -> dict[str, Any]:
    """How likely and how varied the model's own samples are."""
    from dlm_jax.commands.show_sample import settings_of
    from dlm_jax.harness.samples import evaluate_samples
    from dlm_jax.sampling.settings import Settings
    return evaluate_samples(lm, judge, Settings(**settings_of(a)), a.samples, a.max_tokens)


def harness_results(lm: Any, tasks: list[str], a: Arguments, out: Path | None) -> dict[str, Any]:
    """The metrics of each task of the harness."""
    try:
        from dlm_jax.harness.model import HarnessModel
        from dlm_jax.harness.run import evaluate
    except ModuleNotFoundError as error:
        raise UserError(f"the task {tasks[0]} belongs to lm-evaluation-harness, which is not installed ({error.name}); "
                        "pip install 'dlm-jax[eval]'") from error
    from dlm_jax.commands.show_sample import settings_of

    def asked(lm: Any, out: Path | None) -> tuple[dict, dict]:
        model = HarnessModel(lm, a.likelihood, a.max_draws, a.batch_size, **settings_of(a))
        return evaluate(model, tasks, out, a.data, a.include_path, limit=a.limit, num_fewshot=a.num_fewshot,
                        apply_chat_template=a.apply_chat_template)

    results, samples = asked(lm, out)
    if a.against is None:
        return results
    from dlm_jax.harness.compare import compare
    from dlm_jax.language_model import load
    theirs, their_samples = asked(load(a.against, a.tensor, a.fsdp), None if out is None else out / "against")
    differences = {task: compare(samples[task], their_samples[task]) for task in samples}
    return {**results, "against": theirs, "difference": {
        task: {name: {**found._asdict(), "exceeds_noise": found.exceeds_noise} for name, found in each.items()}
        for task, each in differences.items()}}
