"""AdamW behind a schedule and a clip."""

import optax

from dlm_jax.config import Optimizer
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora, trained_table
from dlm_jax.models.weights import unflatten

FULL = Lora()  # all weights are trained


def learning_rate(o: Optimizer, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant, cosine, or stable and a linear decay (WSD)."""
    warmup = optax.linear_schedule(0.0, o.learning_rate, o.warmup + 1)  # the first step is not lost to a rate of 0
    rest = max(steps - o.warmup, 1)  # a short run may end while it warms up
    if o.schedule == "constant":
        body = optax.constant_schedule(o.learning_rate)
    elif o.schedule == "cosine":
        body = optax.cosine_decay_schedule(o.learning_rate, rest, alpha=o.final)
    else:
        fall = optax.linear_schedule(o.learning_rate, o.final * o.learning_rate, max(o.decay, 1))
        body = optax.join_schedules([optax.constant_schedule(o.learning_rate), fall], [rest - o.decay])
    return optax.join_schedules([lambda count: warmup(count + 1), body], [o.warmup])


def make_optimizer(o: Optimizer, steps: int, config: ModelConfig,
                   lora: Lora = FULL) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW whose decay spares biases and norm scales; for the weights that are trained."""
    table = trained_table(config, lora)
    decays = unflatten({path: weight.decays or path.startswith("lora.") for path, weight in table.items()})
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.adamw(learning_rate(o, steps), o.beta1, o.beta2, o.epsilon, weight_decay=o.weight_decay, mask=decays),
    )


