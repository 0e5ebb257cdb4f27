"""What the JSON files of a Hugging Face directory may hold, as far as it is read. Other fields are ignored."""

from dlm_jax.models.config import MAX_DEPTH, MAX_ROWS, MAX_WIDTH
from dlm_jax.schema.kinds import FLAG, TEXT, Schema, either, list_of, map_of, nested, real, whole
from dlm_jax.schema.ranges import MAX_BLOCK

DEPTH, WIDTH, ROWS, ID = whole(1, MAX_DEPTH), whole(1, MAX_WIDTH), whole(1, MAX_ROWS), whole(0, MAX_ROWS)
IDS = either(ID, list_of(ID))

# `rope_parameters`, or `rope_scaling` before transformers 5.
ROPE: Schema = {
    "rope_type": TEXT, "type": TEXT, "rope_theta": real(0), "factor": real(0), "low_freq_factor": real(0),
    "high_freq_factor": real(0), "original_max_position_embeddings": ROWS, "partial_rotary_factor": real(0),
}
# `config.json`. The lines hold the same quantity in the words of LLaMA and Qwen, GPT-2, and LLaDA.
CONFIG: Schema = {
    "model_type": TEXT, "base_model_type": TEXT, "architectures": list_of(TEXT), "layer_types": list_of(TEXT),
    "vocab_size": ROWS, "embedding_size": ROWS,
    "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH,
    "num_hidden_layers": DEPTH, "n_layer": DEPTH, "n_layers": DEPTH,
    "num_attention_heads": WIDTH, "n_head": WIDTH, "n_heads": WIDTH,
    "num_key_value_heads": WIDTH, "n_kv_heads": WIDTH, "head_dim": WIDTH,
    "intermediate_size": WIDTH, "n_inner": WIDTH, "mlp_hidden_size": WIDTH, "mlp_ratio": WIDTH,
    "max_position_embeddings": ROWS, "n_positions": ROWS, "max_sequence_length": ROWS,
    "rms_norm_eps": real(0, 1), "layer_norm_epsilon": real(0, 1),
    "rope_theta": real(0), "rope_parameters": nested(ROPE), "rope_scaling": nested(ROPE),
    "tie_word_embeddings": FLAG, "weight_tying": FLAG, "attention_bias": FLAG, "mlp_bias": FLAG,
    "bos_token_id": IDS, "eos_token_id": IDS, "mask_token_id": ID, "block_size": whole(1, MAX_BLOCK),
    "bd_size": whole(1, MAX_BLOCK),
}
GENERATION: Schema = {"bos_token_id": IDS, "eos_token_id": IDS}  # `generation_config.json`
# What `tokenizer_config.json` and `tokenizer.json` say of the mask token; `data.tokenizer` reads the rest.
TOKENIZER_CONFIG: Schema = {"mask_token": either(TEXT, nested({"content": TEXT}))}
TOKENIZER: Schema = {"added_tokens": list_of(nested({"id": ID, "content": TEXT}))}
INDEX: Schema = {"weight_map": map_of(TEXT)}  # `model.safetensors.index.json`
# `adapter_config.json` of PEFT. What has to be at its default is in `peft.py`.
RANK, SCALE = whole(1, 2**16), real(0)
ADAPTER: Schema = {"r": RANK, "lora_alpha": SCALE, "rank_pattern": map_of(RANK), "alpha_pattern": map_of(SCALE)}
