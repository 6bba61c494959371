"""What published models say of themselves: configurations as they stand in their repositories, and how to shrink them.

"seen" says that the entries were compared with a public copy of the file; "partly seen" that most of those which decide
what is computed were, and the rest is as that version of transformers writes it; "from memory" that no copy was there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A model.

    Attributes:
        config: Its configuration.
        small: What to put in the place of its sizes.
        numbers: How many numbers its weights have, as the hub counts them; None where that is not known for certain.
    """

    config: dict[str, Any]
    small: dict[str, Any]
    numbers: int | None = None


MODELS: dict[str, Published] = {}

# What transformers wrote beside the options of Mamba in version 4.
STEPS = dict(time_step_floor=0.0001, time_step_init_scheme="random", time_step_max=0.1, time_step_min=0.001)
STEPS |= dict(time_step_scale=1.0, rescale_prenorm_residual=False, use_cache=True, initializer_range=0.1)

# Partly seen. Entries of the original stand beside those of transformers.
MAMBA = dict(
    architectures=["MambaForCausalLM"], bos_token_id=0, conv_kernel=4, d_inner=1536, d_model=768, eos_token_id=0
)
MAMBA |= dict(expand=2, fused_add_norm=True, hidden_act="silu", hidden_size=768, intermediate_size=1536)
MAMBA |= dict(layer_norm_epsilon=1e-05, model_type="mamba", n_layer=24, num_hidden_layers=24, pad_token_id=0)
MAMBA |= dict(pad_vocab_size_multiple=8, residual_in_fp32=True, rms_norm=True, ssm_cfg={}, state_size=16)
MAMBA |= dict(time_step_rank=48, torch_dtype="float32", transformers_version="4.39.0.dev0", use_bias=False)
MAMBA |= dict(use_conv_bias=True, vocab_size=50280, **STEPS)
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, time_step_rank=3, vocab_size=40)
MODELS["state-spaces/mamba-130m-hf"] = Published(MAMBA, SMALL | dict(d_model=16, d_inner=32, n_layer=2), 129135360)

# Seen. ``expand`` is not what is meant: intermediate_size goes before it.
FALCON = dict(_name_or_path="./", architectures=["FalconMambaForCausalLM"], bos_token_id=0, conv_kernel=4, expand=16)
FALCON |= dict(eos_token_id=11, hidden_act="silu", hidden_size=4096, intermediate_size=8192, layer_norm_epsilon=1e-05)
FALCON |= dict(model_type="falcon_mamba", num_hidden_layers=64, pad_token_id=11, residual_in_fp32=True, state_size=16)
FALCON |= dict(
    tie_word_embeddings=False, time_step_rank=256, torch_dtype="bfloat16", use_bias=False, use_conv_bias=True
)
FALCON |= dict(transformers_version="4.43.0.dev0", vocab_size=65024, **STEPS)
MODELS["tiiuae/falcon-mamba-7b"] = Published(FALCON, SMALL, 7272665088)
# From memory.
FALCON3 = FALCON | dict(mixer_rms_eps=1e-06, use_falcon_mambapy=False, transformers_version="4.46.1", pad_token_id=0)
MODELS["tiiuae/Falcon3-Mamba-7B-Base"] = Published(FALCON3, SMALL)

# From memory. ``norm_before_gate`` is written and not looked at.
CODESTRAL = dict(architectures=["Mamba2ForCausalLM"], bos_token_id=0, chunk_size=256, conv_kernel=4, eos_token_id=0)
CODESTRAL |= dict(expand=2, head_dim=64, hidden_act="silu", hidden_size=4096, intermediate_size=8192, n_groups=8)
CODESTRAL |= dict(layer_norm_epsilon=1e-05, model_type="mamba2", norm_before_gate=True, num_heads=128, rms_norm=True)
CODESTRAL |= dict(
    num_hidden_layers=64, pad_token_id=0, residual_in_fp32=True, state_size=128, tie_word_embeddings=False
)
CODESTRAL |= dict(time_step_limit=[0.0, math.inf], time_step_rank=256, torch_dtype="bfloat16", vocab_size=32768)
CODESTRAL |= dict(transformers_version="4.44.0.dev0", use_bias=False, use_conv_bias=True, **STEPS)
SMALL2 = dict(hidden_size=32, intermediate_size=64, num_heads=16, head_dim=4, state_size=8, time_step_rank=2)
SMALL2 |= dict(num_hidden_layers=2, vocab_size=40)
MODELS["mistralai/Mamba-Codestral-7B-v0.1"] = Published(CODESTRAL, SMALL2, 7285403648)

# Seen (1.5-Mini); v0.1 has auto_map and mamba_inner_layernorms beside it.
JAMBA = dict(architectures=["JambaForCausalLM"], attention_dropout=0.0, attn_layer_offset=4, attn_layer_period=8)
JAMBA |= dict(bos_token_id=1, eos_token_id=[2, 518], expert_layer_offset=1, expert_layer_period=2, hidden_act="silu")
JAMBA |= dict(hidden_size=4096, initializer_range=0.02, intermediate_size=14336, mamba_conv_bias=True, mamba_d_conv=4)
JAMBA |= dict(mamba_d_state=16, mamba_dt_rank=256, mamba_expand=2, mamba_proj_bias=False, model_type="jamba")
JAMBA |= dict(max_position_embeddings=262144, num_attention_heads=32, num_experts=16, num_experts_per_tok=2)
JAMBA |= dict(num_hidden_layers=32, num_key_value_heads=8, num_logits_to_keep=1, output_router_logits=False)
JAMBA |= dict(pad_token_id=0, rms_norm_eps=1e-06, router_aux_loss_coef=0.001, sliding_window=None, use_cache=True)
JAMBA |= dict(tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.2", vocab_size=65536)
JAMBA |= dict(use_mamba_kernels=True)
SMALL3 = dict(hidden_size=16, intermediate_size=12, mamba_d_state=5, mamba_dt_rank=3, num_attention_heads=4)
SMALL3 |= dict(num_experts=4, num_hidden_layers=6, num_key_value_heads=2, vocab_size=40)
MODELS["ai21labs/AI21-Jamba-1.5-Mini"] = Published(JAMBA, SMALL3, 51570323328)
AUTO = "modeling_jamba.JambaForCausalLM"
JAMBA1 = JAMBA | dict(eos_token_id=2, mamba_inner_layernorms=True, n_ctx=262144, calc_logits_for_entire_prompt=False)
JAMBA1 |= dict(auto_map={"AutoModelForCausalLM": AUTO}, transformers_version="4.40.0.dev0")
MODELS["ai21labs/Jamba-v0.1"] = Published(JAMBA1, SMALL3, 51570323328)
# From memory: one expert is none, and the heads share one key.
JAMBA3 = JAMBA | dict(
    attn_layer_offset=7, attn_layer_period=14, hidden_size=2560, intermediate_size=8192, num_experts=1
)
JAMBA3 |= dict(mamba_dt_rank=160, num_attention_heads=20, num_hidden_layers=28, num_key_value_heads=1, eos_token_id=519)
JAMBA3 |= dict(num_experts_per_tok=1, tie_word_embeddings=True, transformers_version="4.54.0")
SMALL4 = {**SMALL3, "num_experts": 1, "num_key_value_heads": 1, "attn_layer_period": 3, "attn_layer_offset": 1}
MODELS["ai21labs/AI21-Jamba-Reasoning-3B"] = Published(JAMBA3, SMALL4)

# Partly seen. The rotated half is not said, or as ``attn_rotary_emb``.
BAMBA = dict(architectures=["BambaForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_rotary_emb=64)
BAMBA |= dict(attn_layer_indices=[9, 18, 27], bos_token_id=128000, eos_token_id=128001, hidden_act="silu")
BAMBA |= dict(hidden_size=4096, initializer_range=0.02, intermediate_size=14336, mamba_chunk_size=256, mamba_d_conv=4)
BAMBA |= dict(
    mamba_conv_bias=True, mamba_d_head=64, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mlp_bias=False
)
BAMBA |= dict(mamba_n_heads=128, mamba_proj_bias=False, max_position_embeddings=262144, model_type="bamba")
BAMBA |= dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, num_logits_to_keep=1)
BAMBA |= dict(pad_token_id=0, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False)
BAMBA |= dict(torch_dtype="bfloat16", transformers_version="4.48.0.dev0", use_cache=True, vocab_size=128256)
SMALL5 = dict(attn_layer_indices=[1], hidden_size=32, intermediate_size=12, mamba_d_head=16, mamba_d_state=6)
SMALL5 |= dict(mamba_n_heads=4, num_attention_heads=4, num_hidden_layers=3, num_key_value_heads=2, vocab_size=40)
SMALL5 |= dict(attn_rotary_emb=4)
MODELS["ibm-ai-platform/Bamba-9B-v1"] = Published(BAMBA, SMALL5)
BAMBA2 = BAMBA | dict(partial_rotary_factor=0.5, z_loss_coefficient=0.0, transformers_version="4.52.0.dev0")
MODELS["ibm-ai-platform/Bamba-9B-v2"] = Published(BAMBA2, SMALL5)

# Partly seen.
KINDS = ["mamba"] * 5 + ["attention"] + (["mamba"] * 9 + ["attention"]) * 3 + ["mamba"] * 4
GRANITE = dict(architectures=["GraniteMoeHybridForCausalLM"], attention_bias=False, attention_dropout=0.0)
GRANITE |= dict(attention_multiplier=0.0078125, bos_token_id=100257, embedding_multiplier=12, eos_token_id=100257)
GRANITE |= dict(hidden_act="silu", hidden_size=1536, init_method="mup", initializer_range=0.1, intermediate_size=512)
GRANITE |= dict(layer_types=KINDS, logits_scaling=6, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4)
GRANITE |= dict(mamba_d_head=64, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=48)
GRANITE |= dict(mamba_proj_bias=False, max_position_embeddings=131072, model_type="granitemoehybrid")
GRANITE |= dict(normalization_function="rmsnorm", num_attention_heads=12, num_experts_per_tok=6, num_hidden_layers=40)
GRANITE |= dict(num_key_value_heads=4, num_local_experts=64, output_router_logits=False, pad_token_id=100256)
GRANITE |= dict(position_embedding_type="nope", residual_multiplier=0.22, rms_norm_eps=1e-05, rope_scaling=None)
GRANITE |= dict(rope_theta=10000, router_aux_loss_coef=0.0001, shared_intermediate_size=1024, tie_word_embeddings=True)
GRANITE |= dict(torch_dtype="bfloat16", transformers_version="4.56.0", use_cache=True, vocab_size=100352)
SMALL6 = dict(hidden_size=32, intermediate_size=10, layer_types=["mamba", "attention", "mamba"], mamba_d_head=16)
SMALL6 |= dict(mamba_d_state=6, mamba_n_heads=4, num_attention_heads=4, num_experts_per_tok=2, num_hidden_layers=3)
SMALL6 |= dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)  # beyond a small vocabulary otherwise
SMALL6 |= dict(num_key_value_heads=2, num_local_experts=5, shared_intermediate_size=12, vocab_size=40)
MODELS["ibm-granite/granite-4.0-h-tiny"] = Published(GRANITE, SMALL6, 6939037248)
GRANITE1 = GRANITE | dict(hidden_size=4096, intermediate_size=768, shared_intermediate_size=1536, num_local_experts=72)
GRANITE1 |= dict(num_experts_per_tok=10, num_attention_heads=32, num_key_value_heads=8, mamba_n_heads=128)
GRANITE1 |= dict(logits_scaling=16)
MODELS["ibm-granite/granite-4.0-h-small"] = Published(GRANITE1, SMALL6)
GRANITE2 = GRANITE | dict(num_local_experts=62, vocab_size=49160, bos_token_id=0, eos_token_id=0, pad_token_id=0)
GRANITE2 |= dict(transformers_version="4.52.0.dev0")
MODELS["ibm-granite/granite-4.0-tiny-preview"] = Published(GRANITE2, SMALL6)
# Dense: without experts ``intermediate_size`` stands for nothing.
GRANITE3 = GRANITE | dict(hidden_size=2048, intermediate_size=8192, shared_intermediate_size=8192, num_local_experts=0)
GRANITE3 |= dict(num_experts_per_tok=0, num_attention_heads=32, num_key_value_heads=8, mamba_n_heads=64)
GRANITE3 |= dict(attention_multiplier=0.015625, logits_scaling=8)
DENSE = SMALL6 | dict(num_local_experts=0, num_experts_per_tok=0)
MODELS["ibm-granite/granite-4.0-h-micro"] = Published(GRANITE3, DENSE)
# Seen.
GRANITE4 = GRANITE3 | dict(hidden_size=768, intermediate_size=2048, shared_intermediate_size=2048, logits_scaling=3)
GRANITE4 |= dict(num_attention_heads=12, num_key_value_heads=4, mamba_d_head=32, mamba_n_heads=48, num_hidden_layers=32)
GRANITE4 |= dict(residual_multiplier=0.246, max_position_embeddings=32768)
GRANITE4 |= dict(layer_types=["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)])
MODELS["ibm-granite/granite-4.0-h-350m"] = Published(GRANITE4, DENSE)
# From memory: attention only, with positions; options of Mamba are the family's defaults.
GRANITE5 = GRANITE3 | dict(hidden_size=2560, num_attention_heads=40, layer_types=["attention"] * 40, logits_scaling=10)
GRANITE5 |= dict(mamba_d_head=40, mamba_d_state=256, mamba_n_heads=128, position_embedding_type="rope")
GRANITE5 |= dict(rope_theta=10000000)
MODELS["ibm-granite/granite-4.0-micro"] = Published(GRANITE5, DENSE | dict(layer_types=["attention"] * 3), 3402836480)
# As transformers 5 writes the same; its three entries were seen in a model that was trained further.
GRANITE6 = {x: y for x, y in GRANITE5.items() if x not in ("rope_theta", "rope_scaling", "torch_dtype")}
GRANITE6 |= dict(rope_parameters={"rope_theta": 10000000, "rope_type": "default"}, dtype="bfloat16")
GRANITE6 |= dict(time_step_limit=[0.0, {"__float__": "Infinity"}])
MODELS["ibm-granite/granite-4.0-micro, rewritten"] = Published(GRANITE6, DENSE | dict(layer_types=["attention"] * 3))

# Partly seen.
NEMOTRON = dict(architectures=["NemotronHForCausalLM"], attention_bias=False, attention_dropout=0.0, chunk_size=128)
NEMOTRON |= dict(auto_map={"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}, bos_token_id=1)
NEMOTRON |= dict(attention_head_dim=128, conv_kernel=4, eos_token_id=2, expand=2, hidden_dropout=0.0, hidden_size=4096)
NEMOTRON |= dict(hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", initializer_range=0.02)
NEMOTRON |= dict(intermediate_size=21504, layer_norm_epsilon=1e-05, mamba_head_dim=64, mamba_hidden_act="silu")
NEMOTRON |= dict(mamba_num_heads=128, mamba_proj_bias=False, max_position_embeddings=8192, mlp_bias=False)
NEMOTRON |= dict(mlp_hidden_act="relu2", model_type="nemotron_h", n_groups=8, num_attention_heads=32)
NEMOTRON |= dict(num_hidden_layers=52, num_key_value_heads=8, num_logits_to_keep=1, pad_token_id=0)
NEMOTRON |= dict(rescale_prenorm_residual=True, residual_in_fp32=False, rms_norm_eps=1e-05, sliding_window=None)
NEMOTRON |= dict(ssm_state_size=128, tie_word_embeddings=False, time_step_floor=0.0001, time_step_limit=[0.0, math.inf])
NEMOTRON |= dict(time_step_max=0.1, time_step_min=0.001, time_step_rank=256, torch_dtype="bfloat16", use_bias=False)
NEMOTRON |= dict(transformers_version="4.48.0.dev0", use_cache=True, use_conv_bias=True, use_mamba_kernels=True)
NEMOTRON |= dict(vocab_size=131072)
SMALL7 = dict(
    hidden_size=24, hybrid_override_pattern="M-M*-", intermediate_size=20, mamba_head_dim=4, mamba_num_heads=8
)
SMALL7 |= dict(n_groups=4, num_attention_heads=4, num_hidden_layers=5, num_key_value_heads=2, ssm_state_size=6)
SMALL7 |= dict(head_dim=128, vocab_size=40)  # the width of a head stays: older ones say it by another name
MODELS["nvidia/Nemotron-H-8B-Base-8K"] = Published(NEMOTRON, {x: y for x, y in SMALL7.items() if x != "head_dim"})
# Seen in part: heads of attention wider than the model.
NEMOTRON2 = {x: y for x, y in NEMOTRON.items() if x != "attention_head_dim"} | dict(head_dim=128, hidden_size=4480)
NEMOTRON2 |= dict(hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-")
NEMOTRON2 |= dict(intermediate_size=15680, mamba_head_dim=80, num_attention_heads=40, num_hidden_layers=56)
NEMOTRON2 |= dict(eos_token_id=12, max_position_embeddings=131072, transformers_version="4.51.3")
MODELS["nvidia/NVIDIA-Nemotron-Nano-9B-v2"] = Published(NEMOTRON2, SMALL7, 8888227328)
# Seen in part.
NEMOTRON3 = NEMOTRON2 | dict(hidden_size=2688, intermediate_size=1856, mamba_head_dim=64, mamba_num_heads=64)
NEMOTRON3 |= dict(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", num_attention_heads=32
)
NEMOTRON3 |= dict(num_hidden_layers=52, num_key_value_heads=2, n_routed_experts=128, n_shared_experts=1, n_group=1)
NEMOTRON3 |= dict(topk_group=1, norm_topk_prob=True, num_experts_per_tok=6, routed_scaling_factor=2.5, norm_eps=1e-05)
NEMOTRON3 |= dict(moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, partial_rotary_factor=1.0)
NEMOTRON3 |= dict(mamba_ssm_cache_dtype="float32", rope_theta=10000, max_position_embeddings=262144, eos_token_id=2)
SMALL8 = SMALL7 | dict(hybrid_override_pattern="MEM*E", moe_intermediate_size=6, moe_shared_expert_intermediate_size=10)
SMALL8 |= dict(n_routed_experts=8, num_experts_per_tok=3)
MODELS["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"] = Published(
    NEMOTRON3, SMALL8, 31577937344 + 2944
)  # the latter corrections of routers
# Seen: the same pattern in words, as newer ones have it.
WORDS = {"M": "mamba", "*": "attention", "E": "moe"}
NEMOTRON4 = {x: y for x, y in NEMOTRON3.items() if x != "hybrid_override_pattern"}
NEMOTRON4["layers_block_type"] = [WORDS[letter] for letter in NEMOTRON3["hybrid_override_pattern"]]
SMALL9 = {x: y for x, y in SMALL8.items() if x != "hybrid_override_pattern"}
SMALL9["layers_block_type"] = ["mamba", "moe", "mamba", "attention", "moe"]
MODELS["nvidia/NVIDIA-Nemotron-3.5, in words"] = Published(NEMOTRON4, SMALL9)

# Seen (2b).
GEMMA = dict(_block_types=["recurrent", "recurrent", "attention"], architectures=["RecurrentGemmaForCausalLM"])
GEMMA |= dict(attention_bias=False, attention_dropout=0.0, attention_window_size=2048, conv1d_width=4, head_dim=256)
GEMMA |= dict(bos_token_id=2, embeddings_scale_by_sqrt_dim=True, eos_token_id=1, final_w_init_variance_scale=0.07692)
GEMMA |= dict(hidden_activation="gelu_pytorch_tanh", hidden_size=2560, intermediate_size=15360, logits_soft_cap=30.0)
GEMMA |= dict(lru_width=2560, model_type="recurrent_gemma", num_attention_heads=10, num_hidden_layers=26)
GEMMA |= dict(num_key_value_heads=1, pad_token_id=0, partial_rotary_factor=0.5, rms_norm_eps=1e-06, rope_theta=10000.0)
GEMMA |= dict(torch_dtype="bfloat16", transformers_version="4.40.0.dev0", use_cache=True, vocab_size=256000)
GEMMA |= dict(w_init_variance_scale=0.01)
SMALL10 = dict(hidden_size=32, intermediate_size=40, lru_width=32, num_attention_heads=4, num_hidden_layers=4)
SMALL10 |= dict(head_dim=8, vocab_size=40, attention_window_size=5)
MODELS["google/recurrentgemma-2b"] = Published(GEMMA, SMALL10, 2682862080)
# From memory.
GEMMA9 = GEMMA | dict(hidden_size=4096, intermediate_size=24576, lru_width=4096, num_attention_heads=16)
GEMMA9 |= dict(num_hidden_layers=38, transformers_version="4.42.0.dev0", final_w_init_variance_scale=0.0526315)
GEMMA9 |= dict(block_types=GEMMA["_block_types"])
MODELS["google/recurrentgemma-9b"] = Published(GEMMA9, SMALL10)

# Partly seen.
LFM = dict(architectures=["Lfm2ForCausalLM"], block_auto_adjust_ff_dim=True, block_dim=1024, block_ff_dim=6656)
LFM |= dict(block_ffn_dim_multiplier=1.0, block_mlp_init_scale=1.0, block_multiple_of=256, block_norm_eps=1e-05)
LFM |= dict(block_out_init_scale=1.0, block_use_swiglu=True, block_use_xavier_init=True, bos_token_id=1, conv_L_cache=3)
LFM |= dict(conv_bias=False, conv_dim=1024, conv_dim_out=1024, conv_use_xavier_init=True, eos_token_id=7)
LFM |= dict(full_attn_idxs=[2, 5, 8, 10, 12, 14], hidden_size=1024, initializer_range=0.02, model_type="lfm2")
LFM |= dict(max_position_embeddings=128000, norm_eps=1e-05, num_attention_heads=16, num_heads=16, num_hidden_layers=16)
LFM |= dict(num_key_value_heads=8, pad_token_id=0, rope_theta=1000000.0, torch_dtype="bfloat16", use_cache=True)
LFM |= dict(transformers_version="4.54.0.dev0", use_pos_enc=True, vocab_size=65536)
SMALL11 = dict(block_dim=32, block_ff_dim=50, block_multiple_of=8, conv_dim=32, conv_dim_out=32, full_attn_idxs=[1])
SMALL11 |= dict(hidden_size=32, num_attention_heads=4, num_heads=4, num_hidden_layers=3, num_key_value_heads=2)
SMALL11 |= dict(vocab_size=40)
MODELS["LiquidAI/LFM2-350M"] = Published(LFM, SMALL11, 354483968)
LFM1 = LFM | dict(block_dim=2048, block_ff_dim=12288, conv_dim=2048, conv_dim_out=2048, hidden_size=2048)
LFM1 |= dict(num_attention_heads=32, num_heads=32)
MODELS["LiquidAI/LFM2-1.2B"] = Published(LFM1, SMALL11, 1170340608)
LFM2 = LFM1 | dict(block_auto_adjust_ff_dim=False, block_ff_dim=10752, num_hidden_layers=30, tie_embedding=True)
LFM2 |= dict(layer_types=["full_attention" if i in (2, 5, 9, 13, 17, 21, 24, 27) else "conv" for i in range(30)])
del LFM2["full_attn_idxs"]
SMALL12 = {x: y for x, y in SMALL11.items() if x != "full_attn_idxs"} | {
    "layer_types": ["conv", "full_attention", "conv"]
}
MODELS["LiquidAI/LFM2-2.6B"] = Published(LFM2, SMALL12, 2569272320)
# Seen: after training further, the width by its newer name and the list by both, one of them null.
LFM3 = {x: y for x, y in LFM1.items() if x != "block_ff_dim"} | dict(intermediate_size=12288, full_attn_idxs=None)
LFM3 |= dict(layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)])
SMALL13 = {x: y for x, y in SMALL12.items() if x != "block_ff_dim"} | dict(intermediate_size=50)
MODELS["LiquidAI/LFM2.5-1.2B, trained further"] = Published(LFM3, SMALL13)

# Names of tensors as published, without the numbers of layers and experts.
_ENDS = {"lm_head.weight", "model.embed_tokens.weight"}
_ATTENTION = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
_MAMBA = {"A_log", "D", "conv1d.weight", "conv1d.bias", "in_proj.weight", "out_proj.weight"}
_MAMBA1 = {"mixer." + x for x in (*_MAMBA, "x_proj.weight", "dt_proj.weight", "dt_proj.bias")}
_MAMBA2 = _MAMBA | {"dt_bias", "norm.weight"}
_BACKBONE = {"lm_head.weight", "backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers.N.norm.weight"}
_NORMS = {"input_layernorm.weight", "pre_ff_layernorm.weight"}
_GATED = {f"{x}_proj.weight" for x in ("gate", "up", "down")}
_INNER = {f"mamba.{x}_layernorm.weight" for x in ("dt", "b", "c")}
_RGLRU = {f"rg_lru.{x}_gate_{y}" for x in ("input", "recurrent") for y in ("weight", "bias")} | {
    "rg_lru.recurrent_param"
}
_RGLRU |= {f"{x}.{y}" for x in ("linear_x", "linear_y", "linear_out", "conv_1d") for y in ("weight", "bias")}
_RGLRU |= {f"{x}_proj.weight" for x in "qkvo"} | {"o_proj.bias"}
_TWO = {"up_proj.weight", "down_proj.weight"}


def _layers(names: set[str], start: str = "model") -> set[str]:
    return {f"{start}.layers.N.{name}" for name in names}


TENSORS: dict[str, set[str]] = {
    "mamba": _BACKBONE | _layers(_MAMBA1, "backbone"),
    "falcon_mamba": _BACKBONE | _layers(_MAMBA1, "backbone"),
    "mamba2": _BACKBONE | _layers({"mixer." + x for x in _MAMBA2}, "backbone"),
    "jamba": _ENDS
    | {"model.final_layernorm.weight"}
    | _layers({x.replace("mixer.", "mamba.") for x in _MAMBA1} | _INNER | _ATTENTION | _NORMS)
    | _layers({f"feed_forward.{x}" for x in (*_GATED, "router.weight", *(f"experts.N.{y}" for y in _GATED))}),
    "bamba": _ENDS
    | {"model.final_layernorm.weight"}
    | _layers({"mamba." + x for x in _MAMBA2} | _ATTENTION | _NORMS | {"feed_forward." + x for x in _GATED}),
    "granitemoehybrid": _ENDS
    | {"model.norm.weight"}
    | _layers({"mamba." + x for x in _MAMBA2} | _ATTENTION)
    | _layers({"input_layernorm.weight", "post_attention_layernorm.weight", "block_sparse_moe.router.layer.weight"})
    | _layers({f"{x}.{y}_linear.weight" for x in ("shared_mlp", "block_sparse_moe") for y in ("input", "output")}),
    "nemotron_h": _BACKBONE
    | _layers({"mixer." + x for x in (*_MAMBA2, *_TWO, *(f"{x}_proj.weight" for x in "qkvo"))}, "backbone")
    | _layers({"mixer.gate.weight", "mixer.gate.e_score_correction_bias"}, "backbone")
    | _layers({f"mixer.{x}.{y}" for x in ("experts.N", "shared_experts") for y in _TWO}, "backbone"),
    "recurrent_gemma": _ENDS
    | {"model.final_norm.weight"}
    | _layers({"temporal_block." + x for x in _RGLRU} | {"temporal_pre_norm.weight", "channel_pre_norm.weight"})
    | _layers({f"mlp_block.{x}_proj.{y}" for x in ("gate", "up", "down") for y in ("weight", "bias")}),
    "lfm2": _ENDS
    | {"model.embedding_norm.weight"}
    | _layers({"conv.conv.weight", "conv.in_proj.weight", "conv.out_proj.weight", "ffn_norm.weight"})
    | _layers({f"self_attn.{x}" for x in ("q_layernorm.weight", "k_layernorm.weight", "out_proj.weight")})
    | _layers({f"self_attn.{x}_proj.weight" for x in "qkv"} | {f"feed_forward.w{i}.weight" for i in (1, 2, 3)})
    | _layers({"operator_norm.weight"}),
}

# The organisations' own layouts, from memory; what the hybrid says of attention was seen.
S4 = dict(rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
S5 = dict(d_intermediate=0, n_layer=24, vocab_size=50277, ssm_cfg={"layer": "Mamba2"}, attn_layer_idx=[], attn_cfg={})
S5 |= dict(d_model=768, pad_vocab_size_multiple=16, tie_embeddings=True, **S4)
ATTN = dict(causal=True, d_conv=4, head_dim=128, num_heads=30, out_proj_bias=False, qkv_proj_bias=False)
ATTN |= dict(rotary_emb_dim=64)
S6 = dict(d_model=16, n_layer=2, vocab_size=35)
S7 = dict(dim=4096, n_layers=64, vocab_size=32768, n_groups=8, pad_vocab_size_multiple=1, tie_embeddings=False, **S4)
ORIGINALS: dict[str, Published] = {
    "state-spaces/mamba-130m": Published(
        dict(d_model=768, n_layer=24, vocab_size=50277, ssm_cfg={}, pad_vocab_size_multiple=8, **S4), S6, 129135360
    ),
    "state-spaces/mamba2-130m": Published(S5, S6 | dict(d_model=64)),
    "state-spaces/mamba2-2.7b": Published(S5 | dict(d_model=2560, n_layer=64), S6 | dict(d_model=64)),
    "state-spaces/mamba2attn-2.7b": Published(
        S5 | dict(d_model=2560, n_layer=64, attn_layer_idx=[9, 18, 27, 36, 45, 56], attn_cfg=ATTN),
        S6 | dict(d_model=64, attn_layer_idx=[1], attn_cfg=ATTN | dict(num_heads=3)),
    ),
    "mistralai/Mamba-Codestral-7B-v0.1": Published(
        S7 | dict(model_type="mamba"), dict(dim=256, n_layers=2, vocab_size=40), 7285403648
    ),
}
