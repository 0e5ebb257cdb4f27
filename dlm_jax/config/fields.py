"""The keys of a config: types, defaults, ranges and what they mean.

Those of `recipe` are in `diffusion/recipe.py`, those of `lora` in `models/lora.py`.
"""

import dataclasses
from typing import Literal

from dlm_jax.diffusion.recipes import RECIPES, Recipe
from dlm_jax.errors import UserError
from dlm_jax.models.lora import Lora
from dlm_jax.schema.ranges import (
    MAX_LENGTH,
    check_ranges,
    fraction,
    non_negative,
    positive,
    positive_fp32,
    uint32,
    within,
)

Remat = Literal["none", "save_projections", "save_qkv", "save_attention", "full", "offload_projections"]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the model comes from, and how it is computed."""

    base: str  # a native, work or Hugging Face directory, a hub id, or 'bundled' for the model the package carries
    init: Literal["base", "scratch"] = "base"  # start from the base's weights, or from random ones of its shape
    mask: str = "new"  # 'new' adds a mask token (its row is the mean of the others); a token or an id reuses that row
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; the master weights are always float32
    # What of a layer the backward pass computes again instead of keeping it, from nothing ('none') over what is
    # elementwise ('save_projections') and the MLP ('save_qkv') to everything ('full'): see `models/remat.py`.
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the run reads.

    A source is a directory made by `dlm prepare`, a text file, or 'python-stdlib' for the sources of the running
    Python's standard library.
    """

    train: str  # a source, or a mixture of sources: PATH:WEIGHT,PATH:WEIGHT
    validation: str  # a source; text is cut into records as long as those of `train`
    # Tokens per record if `train` is text; a prepared directory has its own length.
    seq_length: int = within(2, MAX_LENGTH)
    validation_records: int = non_negative(0)  # how many records the validation loss reads; 0: all


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with a learning-rate schedule, gradient clipping and a limit on skipped steps."""

    learning_rate: float = positive_fp32()  # the peak
    # After the warmup: 'constant'; 'cosine' decay to the last step; 'wsd' (warmup, stable, decay), which stays constant
    # and then decays linearly over the last `decay_steps`.
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = non_negative(0)  # linear, from 0
    decay_steps: int = non_negative(0)  # for 'wsd' only
    final_lr_ratio: float = non_negative(0.1)  # what 'cosine' and 'wsd' decay to, as a fraction of the peak
    beta1: float = fraction(0.9)  # decay of the mean of the gradients
    beta2: float = fraction(0.95)  # decay of the mean of their squares
    epsilon: float = non_negative(1e-8)  # added to the root of that mean
    # What the first of them is kept in; with bfloat16 the state takes 10 bytes per weight, not 12.
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = non_negative(0.1)  # decoupled; spares biases and norm scales
    grad_clip_norm: float = positive_fp32(1.0)  # the largest global norm of a gradient
    # A step with a non-finite loss or gradient is skipped. More than this many in a row end the run.
    max_skipped_steps: int = non_negative(5)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long the run is and how large its batches are."""

    steps: int = positive()  # optimizer steps
    global_batch_size: int = positive()  # records per step, over all devices
    grad_accum_steps: int = positive(1)  # equal micro-batches per step, one after the other
    seed: int = uint32(0)  # decides initial weights, data order and noise


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """Training by reward instead of by text: the model answers the prompts of `data.train`, and answers that are better
    than others to the same prompt become likelier (GRPO; `diffusion/trajectory.py`)."""

    reward: str = ""  # a name in `training/rewards.py`; empty: train on the text
    # Answers to each prompt. train.global_batch_size counts answers, so a step has batch / group prompts.
    group_size: int = within(2, 1024, 8)
    unmasking: str = "threshold:0.9"  # how answers are written; every token is drawn at temperature 1
    max_tokens: int = positive(64)  # of an answer


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work. One size may be -1: all remaining devices. A single device needs no mesh."""

    replica: int = 1  # copies of the model, each with a part of the batch; across slices and hosts with slow links
    fsdp: int = -1  # shards of the parameters, and of the batch
    context: int = 1  # shards of the parameters, and of each record's tokens, for long ones
    tensor: int = 1  # shards of heads and MLP, for batches smaller than the number of devices


@dataclasses.dataclass(frozen=True)
class Every:
    """Something that happens every so many steps, and after the last."""

    every: int = positive()  # steps from one to the next


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Every):
    """When checkpoints are saved, and which are kept."""

    keep: int = positive(2)  # the newest checkpoints that stay on disk
    keep_every: int = non_negative(0)  # checkpoints at multiples of this step stay as well; 0: none
    minutes: float = non_negative(0.0)  # also save at the first logged step this long after the last save; 0: never


@dataclasses.dataclass(frozen=True)
class LogConfig(Every):
    """What the run reports, and when it counts as stalled."""

    stall: float = non_negative(1800.0)  # seconds without a step before every thread's stack is dumped; 0: never
    wandb: str = ""  # the Weights & Biases project that receives the same numbers; empty: none


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Every):
    """What is measured on the validation text."""

    mc_samples: int = positive(1)  # noise levels drawn per validation record (Monte Carlo samples of the NELBO)
    num_samples: int = non_negative(0)  # unconditional samples to write to samples.jsonl


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a training run. Raises `UserError` for a key out of its range, and for contradictions."""

    recipe: Recipe
    model: ModelSource
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    evaluate: EvaluateConfig
    mesh: MeshConfig = MeshConfig()
    lora: Lora = Lora()
    reinforce: Reinforce = Reinforce()

    def __post_init__(self) -> None:
        for group in dataclasses.fields(self):
            check_ranges(f"config: {group.name}.", getattr(self, group.name))
        self._check_recipe_name()
        self._check_optimizer()
        if self.reinforce.reward:
            self._check_reinforce()
        if self.lora.rank and self.model.init == "scratch":
            raise UserError("config: lora.rank adapts a base and model.init is 'scratch'; change one of them back")
        if self.lora.gated:
            self._check_gated()
        batch, parts = self.train.global_batch_size, self.train.grad_accum_steps
        if batch % parts:
            raise UserError(f"config: train.global_batch_size {batch} cannot be split into train.grad_accum_steps "
                            f"{parts} equal micro-batches; choose a multiple of {parts}")

    def _check_recipe_name(self) -> None:
        """A name by itself changes nothing, and must not claim what the other keys deny."""
        known = RECIPES.get(self.recipe.name, self.recipe)
        for key in ("streams", "alignment", "corruption", "clean_half"):
            ours, named = getattr(self.recipe, key), getattr(known, key)
            if ours != named:
                raise UserError(f"config: recipe.name is '{known.name}', whose {key} is {named!r}, and recipe.{key} is "
                                f"{ours!r}; change both or give the recipe another name")

    def _check_gated(self) -> None:
        """Adapters of masks leave the autoregressive half as it is: there must be one, and it has nothing to learn."""
        if self.recipe.clean_half != "token_causal" or not self.recipe.masks:
            raise UserError("config: lora.gated keeps an autoregressive model beside the denoiser, which needs a "
                            "recipe with masks and clean_half token_causal, such as hybrid_shifted")
        if self.recipe.ar_weight or self.recipe.kl_weight:
            raise UserError("config: lora.gated does not change the autoregressive model, so it can lower neither its "
                            "loss nor its divergence; set recipe.ar_weight and recipe.kl_weight to 0")

    def _check_reinforce(self) -> None:
        """A reward has answers to compare, and a model that is trained by nothing else."""
        batch, group = self.train.global_batch_size, self.reinforce.group_size
        if batch % group:
            raise UserError(f"config: train.global_batch_size {batch} is no multiple of reinforce.group_size {group}; "
                            "choose one that is")
        if not self.recipe.masks or self.recipe.ar_weight or self.recipe.certainty_weight:
            raise UserError("config: reinforce.reward trains a diffusion model by its reward alone; take a diffusion "
                            "recipe and set recipe.ar_weight and recipe.certainty_weight to 0")

    def _check_optimizer(self) -> None:
        """The phases of the learning-rate schedule fit into the run."""
        warmup, decay = self.optimizer.warmup_steps, self.optimizer.decay_steps
        if decay and self.optimizer.schedule != "wsd":
            raise UserError("config: optimizer.decay_steps is for the schedule 'wsd', not "
                            f"'{self.optimizer.schedule}'; set it to 0 or change optimizer.schedule")
        if decay and warmup + decay > self.train.steps:
            raise UserError(f"config: optimizer.warmup_steps {warmup} and optimizer.decay_steps {decay} do not fit "
                            f"into train.steps {self.train.steps}; shorten them or train longer")
