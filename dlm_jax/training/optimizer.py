"""AdamW with a learning-rate schedule and gradient clipping."""

import optax

from dlm_jax.config import OptimizerConfig
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora, trained_table
from dlm_jax.models.weights import unflatten

NO_ADAPTERS = Lora()  # all weights are trained


def learning_rate(o: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warmup, then constant, cosine, or stable with a linear decay at the end (WSD)."""
    warmup = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps + 1)  # + 1: the first step has a rate above 0
    rest = max(steps - o.warmup_steps, 1)  # a short run may end during its warmup
    if o.schedule == "constant":
        body = optax.constant_schedule(o.learning_rate)
    elif o.schedule == "cosine":
        body = optax.cosine_decay_schedule(o.learning_rate, rest, alpha=o.final_lr_ratio)
    else:
        decay = optax.linear_schedule(o.learning_rate, o.final_lr_ratio * o.learning_rate, max(o.decay_steps, 1))
        body = optax.join_schedules([optax.constant_schedule(o.learning_rate), decay], [rest - o.decay_steps])
    return optax.join_schedules([lambda count: warmup(count + 1), body], [o.warmup_steps])


def make_optimizer(o: OptimizerConfig, steps: int, config: ModelConfig,
                   lora: Lora = NO_ADAPTERS) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, for the weights that are trained. Biases and norm scales do not decay."""
    table = trained_table(config, lora)
    decays = unflatten({path: weight.decays or path.endswith(".b") for path, weight in table.items()})
    return optax.chain(
        optax.clip_by_global_norm(o.grad_clip_norm),
        optax.adamw(learning_rate(o, steps), o.beta1, o.beta2, o.epsilon, mu_dtype=o.first_moment_dtype,
                    weight_decay=o.weight_decay, mask=decays),
    )
