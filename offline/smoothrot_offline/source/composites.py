# SPDX-License-Identifier: Apache-2.0
"""The table of each vision-language model whose text tower converts."""

from dataclasses import replace

from smoothrot_offline.source.composite import Composite, SmallImage
from smoothrot_offline.source.families import GEMMA3, LLAMA, MINISTRAL3, MISTRAL, QWEN2, QWEN3
from smoothrot_offline.source.gemma4 import GEMMA4
from smoothrot_offline.source.linear_attention import QWEN3_5
from smoothrot_offline.source.mixtures import QWEN3_5_MOE

_IMAGE_TOKEN = 3
_SIDE = 16
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48}
_ENCODER = {**_WIDTHS, "num_hidden_layers": 1, "num_attention_heads": 2}

# vLLM's classes multiply the logits by it, transformers' have none.
_NO_LOGIT_SCALE = {"logit_scale": (1.0,)}

GEMMA3_VISION = Composite(
    model_type="gemma3",
    class_name="Gemma3ForConditionalGeneration",
    text=(GEMMA3,),
    tower="model.language_model",
    kept=("model.vision_tower", "model.multi_modal_projector"),
    # vLLM's vision tower has one module more than that of transformers.
    renamed={
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "vision_tower.vision_model.": "model.vision_tower.vision_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "model.vision_tower.vision_model.": "model.vision_tower.vision_model.",
        "model.vision_tower.": "model.vision_tower.vision_model.",
    },
    settings=_NO_LOGIT_SCALE,
    image=SmallImage(
        vision=_ENCODER | {"image_size": _SIDE, "patch_size": 4},
        outer={
            "mm_tokens_per_image": 4,
            "image_token_index": _IMAGE_TOKEN,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
        pixels=(1, 3, _SIDE, _SIDE),
        tokens=4,
        types="token_type_ids",
    ),
)

GEMMA4_VISION = Composite(
    model_type="gemma4",
    class_name="Gemma4ForConditionalGeneration",
    text=(GEMMA4,),
    tower="model.language_model",
    kept=("model.vision_tower", "model.embed_vision", "model.audio_tower", "model.embed_audio"),
    # Where an image is, layers are given what they are of this token in transformers, of token 0
    # in vLLM.
    text_settings={"pad_token_id": (0,)},
    image=SmallImage(
        vision=_ENCODER
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 4,
        },
        outer={"image_token_id": _IMAGE_TOKEN, "video_token_id": 4, "audio_token_id": 5},
        # Patches.
        pixels=(1, 16, 3 * 4 * 4),
        tokens=4,
        beside={"image_position_ids": [[[x, y] for y in range(4) for x in range(4)]]},
        types="mm_token_type_ids",
        audio={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [8, 4],
            "output_proj_dims": 24,
        },
    ),
)


MISTRAL3 = replace(
    GEMMA3_VISION,
    model_type="mistral3",
    class_name="Mistral3ForConditionalGeneration",
    text=(MISTRAL, MINISTRAL3),
    writers=("model.multi_modal_projector.linear_2",),
    renamed={
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "vision_tower.": "model.vision_tower.",
    },
    settings={},
    image=SmallImage(
        vision=_ENCODER | {"head_dim": 16, "image_size": _SIDE, "patch_size": 4},
        outer={"spatial_merge_size": 2, "image_token_index": _IMAGE_TOKEN},
        pixels=(1, 3, _SIDE, _SIDE),
        tokens=4,
        beside={"image_sizes": [[_SIDE, _SIDE]]},
    ),
)


IDEFICS3 = Composite(
    model_type="idefics3",
    class_name="Idefics3ForConditionalGeneration",
    text=(LLAMA,),
    tower="model.text_model",
    kept=("model.vision_model", "model.connector"),
    writers=("model.connector.modality_projection.proj",),
    image=SmallImage(
        vision=_ENCODER | {"image_size": _SIDE, "patch_size": 4},
        outer={"scale_factor": 2, "image_token_id": _IMAGE_TOKEN},
        pixels=(1, 1, 3, _SIDE, _SIDE),
        tokens=4,
    ),
)

SMOLVLM = replace(IDEFICS3, model_type="smolvlm", class_name="SmolVLMForConditionalGeneration")


# Positions of images are rotated in sections; of text alone all sections are the same.
QWEN2_5_VL_TEXT = replace(QWEN2, model_type="qwen2_5_vl_text", rotary_sections=True)

_QWEN_TOKENS = {
    "image_token_id": _IMAGE_TOKEN,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}

QWEN2_5_VL = Composite(
    model_type="qwen2_5_vl",
    class_name="Qwen2_5_VLForConditionalGeneration",
    text=(QWEN2_5_VL_TEXT,),
    tower="model.language_model",
    kept=("model.visual",),
    writers=("model.visual.merger.mlp.2",),
    renamed={
        "model.language_model.": "model.language_model.",
        "model.visual.": "model.visual.",
        "model.": "model.language_model.",
        "visual.": "model.visual.",
    },
    image=SmallImage(
        vision=_WIDTHS
        | {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": "hidden_size",
        },
        outer=_QWEN_TOKENS,
        # Patches, each of two frames.
        pixels=(16, 3 * 2 * 4 * 4),
        tokens=4,
        beside={"image_grid_thw": [[1, 4, 4]]},
        types="mm_token_type_ids",
    ),
)


QWEN3_VL_TEXT = replace(
    QWEN3,
    model_type="qwen3_vl_text",
    rotary_sections=True,
    layer_types=False,
    one_window=False,
)

QWEN3_VL = replace(
    QWEN2_5_VL,
    model_type="qwen3_vl",
    class_name="Qwen3VLForConditionalGeneration",
    text=(QWEN3_VL_TEXT,),
    # Features of inner layers are added to the residual stream behind the first decoder layers.
    writers=(
        "model.visual.merger.linear_fc2",
        "model.visual.deepstack_merger_list.*.linear_fc2",
    ),
    renamed={},
    image=replace(
        QWEN2_5_VL.image,
        vision=_WIDTHS
        | {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": "hidden_size",
        },
    ),
)

QWEN3_5_VISION = replace(
    QWEN3_VL,
    model_type="qwen3_5",
    class_name="Qwen3_5ForConditionalGeneration",
    text=(QWEN3_5,),
    writers=("model.visual.merger.linear_fc2",),
    image=replace(
        QWEN3_VL.image,
        vision={
            key: value
            for key, value in QWEN3_VL.image.vision.items()
            if key != "deepstack_visual_indexes"
        },
    ),
)

QWEN3_5_MOE_VISION = replace(
    QWEN3_5_VISION,
    model_type="qwen3_5_moe",
    class_name="Qwen3_5MoeForConditionalGeneration",
    text=(QWEN3_5_MOE,),
)

_TABLES = (
    GEMMA3_VISION,
    GEMMA4_VISION,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_5_VISION,
    QWEN3_5_MOE_VISION,
    MISTRAL3,
    IDEFICS3,
    SMOLVLM,
)
COMPOSITES = {table.model_type: table for table in _TABLES}
