"""The recipes by name: what each paper did, as far as it states that, and one of our own."""

from dlm_jax.diffusion.recipe import Recipe, recipe_at
from dlm_jax.errors import UserError

__all__ = ["RECIPES", "Recipe", "recipe", "recipe_at"]

# LLaDA2.0's warm-up, stable phase on whole records and decay. The paper gives the sizes; the step counts are ours.
WSD = "1x500,4x500,32x500,64x500,4096x6000,2048x250,1024x250,512x250,256x250,128x250,64x250"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Plain next-token training, which makes the autoregressive base.
        Recipe("ar", streams=1, alignment="shifted", corruption="none"),

        # DiffuLLaMA, arXiv 2410.17891, with its GPT-2 annealing of 10,000 steps. First tokens are never masked, and the
        # loss is divided by all tokens (the NELBO). The authors' code divides by the masked ones: normalizer 'masked'.
        # Their 7B has no annealing, and may have been trained with a weight of t, which their code had at first.
        Recipe("diffullama", streams=1, alignment="shifted", anneal_steps=10_000),

        # MDLM, arXiv 2406.07524: one stream, no shift, full visibility from the start.
        Recipe("mdlm", streams=1, alignment="same_position"),

        # BD3-LM, arXiv 2503.09573: linear schedule, one level per block. Its clipped ranges are t_min and t_max, such
        # as (.3, .8).
        Recipe("bd3lm", streams=2, alignment="same_position", block_size=16),

        # Efficient-DLM, arXiv 2512.14067, at 1.5B: block 16 (64 from 4B), lambda 0.1. The weight is 1/t of the block,
        # not the inverse of a token's own masking probability, so later tokens count more and the loss bounds nothing.
        Recipe("efficient_dlm", streams=2, alignment="same_position", corruption="position_dependent", block_size=16,
               half_life=0.1),

        # LLaDA2.0, arXiv 2512.15745: blocks grow to the whole record and shrink back to 32.
        Recipe("llada2_wsd", streams=2, alignment="same_position", block_size=32, block_schedule=WSD),

        # Fast-dLLM v2, arXiv 2509.26328: the shift is kept, each token is masked in one row of a pair, and the loss is
        # the plain cross-entropy of the masked tokens.
        Recipe("fast_dllm_v2", streams=2, alignment="shifted", block_size=32, complementary=True, loss_weight="none",
               normalizer="masked"),

        # Nemotron-Labs-Diffusion, arXiv 2607.05722: L_AR + 0.3 L_diff, which is this up to a factor that AdamW cancels
        # and gradient clipping sees; one level per sequence; the clean half is the AR model. The paper does not state
        # its training block size.
        Recipe("nemotron", streams=2, alignment="same_position", block_size=32, level_per="sequence",
               clean_half="token_causal", ar_weight=1 / 0.3),

        # Set Block Decoding, arXiv 2509.04185: the next-token loss on a token-causal clean half, plus the plain
        # cross-entropy of the masked tokens, one level per sequence. It samples with the selector `entropy_bound`. We
        # take masked tokens to be predicted at their own positions, and its blocks of 16, one of the sizes it tries.
        Recipe("set_block_decoding", streams=2, alignment="same_position", block_size=16, level_per="sequence",
               clean_half="token_causal", loss_weight="none", normalizer="masked", ar_weight=1.0),

        # Jacobi Forcing, arXiv 2512.14681, on the model's own text: the end of each block is shown as a Jacobi
        # iteration has left it (objective/jacobi.py). The paper adds the next-token loss to the divergence from the
        # model's own distribution over right tokens; its blocks are of 16, then 32, and the share of wrong tokens grows
        # from block to block in windows. Ours is the plain cross-entropy, with shares drawn at random.
        Recipe("jacobi_forcing", streams=2, alignment="shifted", corruption="jacobi", block_size=16,
               clean_half="token_causal", loss_weight="none", normalizer="masked", ar_weight=1.0),

        # Dream, arXiv 2508.15487: DiffuLLaMA's shift at full visibility, weighted by the closeness of context (CART).
        Recipe("dream", streams=1, alignment="shifted", loss_weight="cart"),

        # dParallel, arXiv 2509.26488: certainty-forcing distillation, on the model's own answers. Half of each block is
        # masked, and in a second row the other half; the loss is the cross-entropy plus twice the entropy at the tokens
        # that are right already. Here as a sequel to `hybrid_shifted`, whose clean half stays the AR model; the authors
        # continue LLaDA and Dream with LoRA of rank 128, in blocks of 32 of one stream.
        Recipe("dparallel", streams=2, alignment="shifted", block_size=16, complementary=True, t_min=0.49, t_max=0.51,
               loss_weight="none", normalizer="masked", clean_half="token_causal", ar_weight=1.0, certainty_weight=2.0),

        # Our own: shifted, with a token-causal clean half, an AR loss beside the diffusion loss, and position-dependent
        # masking. The argument is in docs/claims_stories.md (a 260k model, 0.8M tokens; numbers in nats). A token-
        # causal clean half costs nothing and leaves an AR model inside. With the shift, both halves predict a token
        # from the position before it; so an AR loss, which costs the diffusion loss 0.30 at the same position, improves
        # it by 0.04 and keeps the AR likelihood to within 0.06. The shift itself gains 0.39 without that loss and 0.63
        # with it. Position-dependent masks gain 0.03 to 0.06 at one to four tokens per forward pass. Left out: growing
        # blocks (-0.14 in so short a run) and complementary masks (+0.06 at twice the cost). With exact counts the true
        # weight is m/k, at most m since every block has a mask. In longer runs same-position training has the lower
        # NELBO (docs/performance.md, and a point of accuracy in Efficient-DLM), no AR model inside any longer, and
        # still the higher loss in decoding.
        Recipe("hybrid_shifted", streams=2, alignment="shifted", corruption="position_dependent", block_size=16,
               half_life=0.1, min_one_mask=True, clean_half="token_causal", loss_weight="inverse_count", ar_weight=1.0),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `UserError`, which lists the names, for an unknown one."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]
