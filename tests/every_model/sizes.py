"""How small the models are: fields by their usual names, and what single types need besides.

A field is given to a configuration (or to one inside it) only where that has a field of the name.
"""

VOCAB = 128
WINDOW = 12

SIZES = {
    "vocab_size": VOCAB,
    "type_vocab_size": 2,
    # Width. head_dim is not hidden_size / num_attention_heads, so that neither passes for the other.
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embedding_size": 64,
    "head_dim": 24,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    # Depth. Encoders as deep as decoders: transformers sizes some caches by the encoder.
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    # Heads.
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    # Multi-head latent attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Windows and lengths.
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_sequence_length": 512,
    "max_seq_len": 512,
    "max_target_positions": 512,
    "max_source_positions": 64,
    # State of recurrent layers.
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Sparse indexes.
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 16,
    # A decoder that stands alone.
    "is_decoder": True,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}

# Fields of single types, instead of those above or besides them; those of a configuration inside
# another by a dictionary.
SPECIAL: dict[str, dict] = {}
