// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace smoothrot {

enum class Float : int { f32, bf16, f16 };

}  // namespace smoothrot
