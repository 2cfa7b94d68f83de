// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace smoothrot {

enum class Float : int { f32, bf16, f16 };

// Tokens of one expert that a tile of gemm_experts computes at most;
// smoothrot_vllm.grouped_experts.TILE_TOKENS.
constexpr int64_t kExpertTileTokens = 64;

// Largest group scale; smoothrot_vllm.format.GROUP_SCALE_MAX.
constexpr int64_t kMostGroupScale = 15;

}  // namespace smoothrot
