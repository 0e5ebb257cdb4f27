"""The recipes by name: what each paper did, as far as it says so, and what we would do."""

from dlm_jax.diffusion.recipe import Recipe, recipe_at
from dlm_jax.errors import UserError

__all__ = ["RECIPES", "Recipe", "recipe", "recipe_at"]

# LLaDA2.0's warm-up, stable phase on whole records and decay. The paper gives the sizes; the steps are ours.
WSD = "1x500,4x500,32x500,64x500,4096x6000,2048x250,1024x250,512x250,256x250,128x250,64x250"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Plain next-token training: makes the autoregressive base.
        Recipe("ar", streams=1, alignment="shifted", corruption="none"),

        # arXiv 2410.17891 with its GPT-2 annealing of 10,000 steps; first tokens are protected, and the loss is divided
        # by all tokens (the NELBO). The authors' code divides by the masked ones: normaliser 'masked'. Their 7B has no
        # annealing, and may have been trained with a weight of t, which their code had at first.
        Recipe("diffullama", streams=1, alignment="shifted", anneal_steps=10_000),

        # arXiv 2406.07524: one stream, no shift, full visibility from the start.
        Recipe("mdlm", streams=1, alignment="same_position"),

        # arXiv 2503.09573, linear schedule, a level a block. Its clipped ranges are t_min and t_max, such as (.3, .8).
        Recipe("bd3lm", streams=2, alignment="same_position", block_size=16),

        # arXiv 2512.14067 at 1.5B: block 16 (64 from 4B), lambda 0.1. The weight is 1/t of the block, not the inverse
        # of a token's own probability: so late tokens count more, and the loss bounds nothing.
        Recipe("efficient_dlm", streams=2, alignment="same_position", corruption="position_dependent", block_size=16,
               half_life=0.1),

        # arXiv 2512.15745: blocks grow to the record and shrink back to 32.
        Recipe("llada2_wsd", streams=2, alignment="same_position", block_size=32, blocks=WSD),

        # arXiv 2509.26328: the shift is kept, each token is masked in one of a pair, plain cross-entropy of the masked.
        Recipe("fast_dllm_v2", streams=2, alignment="shifted", block_size=32, complementary=True, weight="none",
               normaliser="masked"),

        # arXiv 2607.05722: L_AR + 0.3 L_diff, which is this up to a factor that AdamW undoes and a clip sees; one level
        # a sequence; the clean half is the AR model. The size of its training blocks is not stated.
        Recipe("nemotron", streams=2, alignment="same_position", block_size=32, levels="sequence",
               clean_half="token_causal", ar_weight=1 / 0.3),

        # arXiv 2508.15487: DiffuLLaMA's shift at full visibility, weighted by the closeness of context (CART).
        Recipe("dream", streams=1, alignment="shifted", weight="cart"),

        # Ours, by the gains that are published (points of accuracy, in the papers above and NBDiff, arXiv 2512.06776):
        # clean context instead of noisy +9.5; clean half token-causal +17 early on; AR loss on it +4 to +7.5; blocks
        # that grow +2; position-dependent masks +1.8 at one token a forward pass and +4.4 at six; means over the whole
        # batch +2.1; no shift +0.7 to +1.3; a level a block costs nothing. Nobody has shown position-dependent masks
        # with an AR loss. Its weight is the best of Nemotron's sweep (L_diff 0.3 of 0.1 to 1); at equal weights a 260k
        # model lost 0.10 nats of its AR likelihood. With exact counts the true weight is m/k, at most m where each
        # block has a mask.
        Recipe("best", streams=2, alignment="same_position", corruption="position_dependent", block_size=16,
               half_life=0.1, at_least_one=True, clean_half="token_causal", weight="inverse_count", ar_weight=1 / 0.3,
               blocks="1x50,2x50,4x50,8x50"),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, or `UserError` with the names there are."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]
