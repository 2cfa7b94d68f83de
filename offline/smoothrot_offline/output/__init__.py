# SPDX-License-Identifier: Apache-2.0
"""What a conversion writes, whole or not at all."""
